/* The memory for one token: the recurrence itself, and reading at fixed weights.

   Every batch row and head is on its own. A step reads each matrix of its state once and writes it once: keys run
   forward through the anchor and errors back, and then each layer's weights and momentum are updated and, in the same
   pass, multiplied by the query that has come through the layers below. */

#include "cpu_runtime/activation.h"
#include "cpu_runtime/matvec.h"
#include "layer_norm.h"
#include "cpu_runtime/thread_pool.h"

#include <stdlib.h>

/* [batch, heads, ...]: of vectors or matrices that are dense, or of single numbers; null: there is none */
typedef struct {
    real *data;
    int64_t row, head;
} heads;

typedef struct {
    int64_t out, in;
    heads weights, momentum, anchor, new_weights, new_momentum;
} layer;

enum row { WITHIN, STARTS, MASKED }; /* a row's token: inside its chunk, the first of it, or none at all */

typedef struct {
    int64_t batch, heads, layers, activation, after, threads;
    heads q, k, v, theta, eta, alpha, gain, y;
    layer layer[];
} call;

INLINE real *of(const heads *x, int64_t row, int64_t head) { return x->data + row * x->row + head * x->head; }

/* -- one row and head ----------------------------------------------------------------------------------------------- */

/* Vectors of scratch; those of a layer are side by side, `at[l]` numbers from the first layer's. */
typedef struct {
    real *input, *slope, *error, *asked, *key, *value, *query, *gain, *n;
} room;

/* Numbers that one thread needs; where there are some from `start` on, `room` is laid out in them. */
static size_t room_of(const call *call, real *start, room *room) {
    size_t all_layers = 0, widest = padded((int)call->layer[0].in);
    for (int l = 0; l < call->layers; l++) {
        size_t width = padded((int)call->layer[l].out);
        all_layers += width;
        widest = width > widest ? width : widest;
    }
    all_layers += widest;
    if (start) {
        real *next = start, **long_ones[] = {&room->input, &room->slope, &room->error, &room->asked};
        for (size_t i = 0; i < sizeof long_ones / sizeof *long_ones; i++, next += all_layers)
            *long_ones[i] = next;
        real **short_ones[] = {&room->key, &room->value, &room->query, &room->gain, &room->n};
        for (size_t i = 0; i < sizeof short_ones / sizeof *short_ones; i++, next += widest)
            *short_ones[i] = next;
    }
    return (4 * all_layers + 5 * widest + LINE - 1) / LINE * LINE;
}

static void load(const heads *x, int64_t row, int64_t head, int64_t width, real *to) {
    take_vector((int)width, of(x, row, head), to);
}

/* y = x + n(z) gain, or z */
static void conclude(const call *call, int width, const real *x, const real *gain, real *z, real *y) {
    if (call->gain.data) {
        normalise(width, z, z);
        for (int i = 0; i < width; i += WIDTH)
            put(z + i, get(x + i) + get(z + i) * get(gain + i));
    }
    memcpy(y, z, width * sizeof(real));
}

/* The error and the inputs of every layer at the anchor; returns the norm of half the gradient. */
static double learn(const call *call, int64_t row, int64_t head, int starts, const room *room) {
    int top = (int)call->layers - 1, at = 0;
    size_t offset[call->layers + 1];
    const real *anchor[call->layers], *input = room->key;
    for (int l = 0; l <= top; l++) {
        const layer *layer = &call->layer[l];
        int out = (int)layer->out;
        anchor[l] = of(starts ? &layer->weights : &layer->anchor, row, head);
        offset[l] = at;
        apply(out, (int)layer->in, anchor[l], layer->in, input, room->error + at);
        if (l < top) {
            activate_each((enum activation)call->activation, padded(out), room->error + at, room->input + at,
                          room->slope + at, NULL);
            input = room->input + at;
        }
        at += padded(out);
    }
    int width = (int)call->layer[top].out;
    real *error = room->error + offset[top];
    if (call->gain.data)
        norm_error(width, room->key, room->value, room->gain, error, room->n, error);
    else
        for (int i = 0; i < width; i += WIDTH)
            put(error + i, get(error + i) - get(room->value + i));
    for (int l = top; l > 0; l--) {
        int out = (int)call->layer[l].out, in = (int)call->layer[l].in;
        real *below = room->error + offset[l - 1];
        apply_reversed(out, in, anchor[l], in, room->error + offset[l], below, 0);
        for (int i = 0; i < in; i += WIDTH)
            put(below + i, get(below + i) * get(room->slope + offset[l - 1] + i));
    }
    double total = 0;
    for (int l = 0; l <= top; l++) {
        const real *input = l ? room->input + offset[l - 1] : room->key;
        double of_layer = length((int)call->layer[l].out, room->error + offset[l]) *
                          length((int)call->layer[l].in, input);
        total = hypot(total, of_layer);
    }
    return total;
}

/* new momentum = lasting momentum - push input^T, new weights = kept weights + that, y = weights x: all in one pass.
   `push` counts the step's size in. */
INLINE void update(int out, int in, int with_momentum, int after, real kept, real lasting, const real *push,
                   const real *input, const real *weights, const real *momentum, real *new_weights, real *new_momentum,
                   const real *x, real *y) {
    for (int o = 0; o < out; o += WIDTH) {
        vec total[WIDTH] = {};
        for (int r = 0; r < least(WIDTH, out - o); r++) {
            size_t row = (size_t)(o + r) * in;
            for (int i = 0; i < in; i += WIDTH) {
                __builtin_prefetch(weights + row + AHEAD + i);
                vec before = get_some(weights + row + i, in - i), surprise = get(input + i) * -push[o + r];
                if (with_momentum) {
                    __builtin_prefetch(momentum + row + AHEAD + i);
                    surprise += get_some(momentum + row + i, in - i) * lasting;
                    put_some(new_momentum + row + i, surprise, in - i);
                }
                vec then = before * kept + surprise;
                put_some(new_weights + row + i, then, in - i);
                total[r] += (after ? then : before) * get(x + i);
            }
        }
        put(y + o, sums(total));
    }
}

static __attribute__((noinline)) void update_any(int out, int in, int after, real kept, real lasting, const real *push,
                                                 const real *input, const real *weights, const real *momentum,
                                                 real *new_weights, real *new_momentum, const real *x, real *y) {
    if (momentum && after)
        update(out, in, 1, 1, kept, lasting, push, input, weights, momentum, new_weights, new_momentum, x, y);
    else if (momentum)
        update(out, in, 1, 0, kept, lasting, push, input, weights, momentum, new_weights, new_momentum, x, y);
    else if (after)
        update(out, in, 0, 1, kept, 0, push, input, weights, NULL, new_weights, NULL, x, y);
    else
        update(out, in, 0, 0, kept, 0, push, input, weights, NULL, new_weights, NULL, x, y);
}

static void copy(const call *call, int64_t row, int64_t head) {
    for (int l = 0; l < call->layers; l++) {
        const layer *layer = &call->layer[l];
        size_t size = layer->out * layer->in * sizeof(real);
        memcpy(of(&layer->new_weights, row, head), of(&layer->weights, row, head), size);
        if (layer->momentum.data)
            memcpy(of(&layer->new_momentum, row, head), of(&layer->momentum, row, head), size);
    }
    memset(of(&call->y, row, head), 0, call->layer[call->layers - 1].out * sizeof(real));
}

static void step_one(const call *call, int64_t row, int64_t head, enum row kind, double clip, double threshold,
                     const room *room) {
    int top = (int)call->layers - 1;
    if (kind == MASKED) {
        copy(call, row, head);
        return;
    }
    load(&call->k, row, head, call->layer[0].in, room->key);
    load(&call->q, row, head, call->layer[0].in, room->query);
    load(&call->v, row, head, call->layer[top].out, room->value);
    if (call->gain.data)
        load(&call->gain, row, head, call->layer[top].out, room->gain);
    double norm = learn(call, row, head, kind == STARTS, room);
    /* gradients are twice what errors and inputs make */
    double size = 2 * (double)*of(&call->theta, row, head);
    if (clip > 0 && 2 * norm > clip)
        size *= clip / (2 * norm);
    int held = 2 * norm < threshold; /* what is not a number is not held back */
    if (held)
        size = 0;
    real kept = call->alpha.data && !held ? 1 - *of(&call->alpha, row, head) : 1;
    real lasting = call->eta.data ? *of(&call->eta, row, head) : 0;
    const real *input = room->key, *x = room->query;
    int at = 0;
    for (int l = 0; l <= top; l++) {
        const layer *layer = &call->layer[l];
        int out = (int)layer->out;
        real *push = room->error + at, *y = room->asked + at;
        for (int i = 0; i < out; i += WIDTH)
            put(push + i, get(push + i) * (real)size);
        update_any(out, (int)layer->in, (int)call->after, kept, lasting, push, input, of(&layer->weights, row, head),
                   layer->momentum.data ? of(&layer->momentum, row, head) : NULL, of(&layer->new_weights, row, head),
                   layer->momentum.data ? of(&layer->new_momentum, row, head) : NULL, x, y);
        if (l < top)
            activate_each((enum activation)call->activation, padded(out), y, y, NULL, NULL);
        input = room->input + at, x = y;
        at += padded(out);
    }
    int width = (int)call->layer[top].out;
    conclude(call, width, room->query, room->gain, room->asked + at - padded(width), of(&call->y, row, head));
}

static void read_one(const call *call, int64_t row, int64_t head, const room *room) {
    int top = (int)call->layers - 1, at = 0;
    load(&call->q, row, head, call->layer[0].in, room->query);
    if (call->gain.data)
        load(&call->gain, row, head, call->layer[top].out, room->gain);
    const real *x = room->query;
    for (int l = 0; l <= top; l++) {
        const layer *layer = &call->layer[l];
        real *y = room->asked + at;
        apply((int)layer->out, (int)layer->in, of(&layer->weights, row, head), layer->in, x, y);
        if (l < top) {
            activate_each((enum activation)call->activation, padded((int)layer->out), y, y, NULL, NULL);
            at += padded((int)layer->out);
        }
        x = y;
    }
    int width = (int)call->layer[top].out;
    conclude(call, width, room->query, room->gain, room->asked + at, of(&call->y, row, head));
}

/* -- all of them ---------------------------------------------------------------------------------------------------- */

struct token {
    const call *call;
    const char *rows;
    double clip, threshold;
    const room *rooms; /* one for each thread */
};

static void step_part(const void *context, int64_t i, int worker) {
    const struct token *t = context;
    int64_t row = i / t->call->heads;
    step_one(t->call, row, i % t->call->heads, (enum row)t->rows[row], t->clip, t->threshold,
             &t->rooms[worker]);
}

static void read_part(const void *context, int64_t i, int worker) {
    const struct token *t = context;
    read_one(t->call, i / t->call->heads, i % t->call->heads, &t->rooms[worker]);
}

static int run(const call *call, const char *rows, double clip, double threshold, part *part) {
    size_t numbers = room_of(call, NULL, NULL);
    room rooms[call->threads];
    real *scratch = aligned_alloc(64, call->threads * numbers * sizeof(real));
    if (!scratch)
        return 1;
    for (int i = 0; i < call->threads; i++)
        room_of(call, scratch + i * numbers, &rooms[i]);
    struct token token = {call, rows, clip, threshold, rooms};
    share_out(call->threads, call->batch * call->heads, part, &token);
    free(scratch);
    return 0;
}

/* One token of each row. `rows`: one `enum row` for each; `clip`: 0 for none; of less surprise than `threshold` a token
   neither writes nor forgets. Returns 0, or 1: out of memory. */
int step(const call *call, const char *rows, double clip, double threshold) {
    return run(call, rows, clip, threshold, step_part);
}

/* One query of each row at fixed weights. */
int read_token(const call *call, const char *rows, double clip, double threshold) {
    return run(call, rows, clip, threshold, read_part);
}
