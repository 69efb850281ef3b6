/* The memory for one token: the recurrence itself, and reading at fixed weights.

   Every batch row and head is on its own. A step reads each matrix of its state once and writes it once: the key goes
   forward through the anchor and the error back, and then each layer's weights and momentum are updated and, in the
   same pass, multiplied by the query that has come through the layers below. */

#include "cpu_runtime/activation.h"
#include "cpu_runtime/matvec.h"
#include "layer_norm.h"
#include "cpu_runtime/thread_pool.h"

#include <stdlib.h>

/* [batch, heads, ...] of dense vectors or matrices, or of numbers; null: none */
typedef struct {
    real *data;
    int64_t row, head;
} heads;

typedef struct {
    int64_t out, in;
    heads weights, momentum, anchor, new_weights, new_momentum;
} layer;

/* At which weights the query is read: those before the token, after it, or at its chunk's start. */
enum reading { BEFORE, AFTER, ANCHOR };

typedef struct {
    int64_t batch, heads, layers, chunk, activation, loss, read, threads;
    heads q, k, v, theta, eta, alpha, gain, y;
    const int64_t *position; /* [batch] */
    const uint8_t *mask;     /* one for each row, `mask_row` apart; null: no token is masked */
    int64_t mask_row;
    layer layer[];           /* behind them: `bounds` */
} call;

typedef struct {
    double clip, threshold, p, delta, smooth; /* 0: no clip, no threshold; the others are of the loss */
} bounds;

INLINE const bounds *bounds_of(const call *call) { return (const bounds *)&call->layer[call->layers]; }

INLINE real *of(const heads *x, int64_t row, int64_t head) { return x->data + row * x->row + head * x->head; }

/* -- one row and head ----------------------------------------------------------------------------------------------- */

/* Vectors of scratch; the first four have all layers' vectors one after the other. */
typedef struct {
    real *input, *slope, *error, *query_z, *key, *value, *query, *gain, *n;
} work;

/* Numbers that one thread needs; with a `start`, `work` is laid out from there on. */
static size_t take_work(const call *call, real *start, work *work) {
    size_t all_layers = 0, widest = padded((int)call->layer[0].in);
    for (int l = 0; l < call->layers; l++) {
        size_t width = padded((int)call->layer[l].out);
        all_layers += width;
        widest = width > widest ? width : widest;
    }
    all_layers += widest;
    if (start) {
        real *next = start, **of_layers[] = {&work->input, &work->slope, &work->error, &work->query_z};
        for (size_t i = 0; i < sizeof of_layers / sizeof *of_layers; i++, next += all_layers)
            *of_layers[i] = next;
        real **single[] = {&work->key, &work->value, &work->query, &work->gain, &work->n};
        for (size_t i = 0; i < sizeof single / sizeof *single; i++, next += widest)
            *single[i] = next;
    }
    return (4 * all_layers + 5 * widest + LINE - 1) / LINE * LINE;
}

static void load(const heads *x, int64_t row, int64_t head, int64_t width, real *to) {
    take_vector((int)width, of(x, row, head), to);
}

/* y = x + n(z) gain, or z */
static void read_output(const call *call, int width, const work *work, real *z, real *y) {
    if (call->gain.data)
        norm_read(width, work->query, work->gain, z, work->n, z);
    memcpy(y, z, width * sizeof(real));
}

/* The error and the inputs of every layer at the anchor; returns the norm of half the gradient. */
static double differentiate(const call *call, int64_t row, int64_t head, int starts, const work *work) {
    int top = (int)call->layers - 1, at = 0;
    size_t offset[call->layers + 1];
    const real *anchor[call->layers], *input = work->key;
    for (int l = 0; l <= top; l++) {
        const layer *layer = &call->layer[l];
        int out = (int)layer->out;
        anchor[l] = of(starts ? &layer->weights : &layer->anchor, row, head);
        offset[l] = at;
        apply(out, (int)layer->in, anchor[l], layer->in, input, work->error + at);
        if (l < top) {
            activate_each((enum activation)call->activation, padded(out), work->error + at, work->input + at,
                          work->slope + at, NULL);
            input = work->input + at;
        }
        at += padded(out);
    }
    int width = (int)call->layer[top].out;
    real *error = work->error + offset[top];
    const bounds *b = bounds_of(call);
    objective objective = {(enum loss)call->loss, (real)b->p, (real)b->delta, (real)b->smooth};
    if (call->gain.data)
        norm_error(&objective, width, work->key, work->value, work->gain, error, work->n, error);
    else
        half_error(&objective, padded(width), error, work->value, error);
    for (int l = top; l > 0; l--) {
        int out = (int)call->layer[l].out, in = (int)call->layer[l].in;
        real *below = work->error + offset[l - 1];
        apply_reversed(out, in, anchor[l], in, work->error + offset[l], below, 0);
        for (int i = 0; i < in; i += WIDTH)
            store_vec(below + i, load_vec(below + i) * load_vec(work->slope + offset[l - 1] + i));
    }
    double total = 0;
    for (int l = 0; l <= top; l++) {
        const real *input = l ? work->input + offset[l - 1] : work->key;
        double of_layer = length((int)call->layer[l].out, work->error + offset[l]) *
                          length((int)call->layer[l].in, input);
        total = hypot(total, of_layer);
    }
    return total;
}

/* new momentum = eta momentum - error input^T, new weights = retain weights + that, y = weights x: all in one pass.
   The error is times the step. */
INLINE void update(int out, int in, int with_momentum, int after, real retain, real eta, const real *error,
                   const real *input, const real *weights, const real *momentum, real *new_weights, real *new_momentum,
                   const real *x, real *y) {
    for (int o = 0; o < out; o += WIDTH) {
        vec total[WIDTH] = {};
        for (int r = 0; r < min(WIDTH, out - o); r++) {
            size_t row = (size_t)(o + r) * in;
            for (int i = 0; i < in; i += WIDTH) {
                __builtin_prefetch(weights + row + AHEAD + i);
                vec before = load_partial(weights + row + i, in - i), moved = load_vec(input + i) * -error[o + r];
                if (with_momentum) {
                    __builtin_prefetch(momentum + row + AHEAD + i);
                    moved += load_partial(momentum + row + i, in - i) * eta;
                    store_partial(new_momentum + row + i, moved, in - i);
                }
                vec then = before * retain + moved;
                store_partial(new_weights + row + i, then, in - i);
                total[r] += (after ? then : before) * load_vec(x + i);
            }
        }
        store_vec(y + o, sums(total));
    }
}

static __attribute__((noinline)) void update_any(int out, int in, int after, real retain, real eta, const real *error,
                                                 const real *input, const real *weights, const real *momentum,
                                                 real *new_weights, real *new_momentum, const real *x, real *y) {
    if (momentum && after)
        update(out, in, 1, 1, retain, eta, error, input, weights, momentum, new_weights, new_momentum, x, y);
    else if (momentum)
        update(out, in, 1, 0, retain, eta, error, input, weights, momentum, new_weights, new_momentum, x, y);
    else if (after)
        update(out, in, 0, 1, retain, 0, error, input, weights, NULL, new_weights, NULL, x, y);
    else
        update(out, in, 0, 0, retain, 0, error, input, weights, NULL, new_weights, NULL, x, y);
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

/* The query at fixed weights: those of the state, or the anchor. */
static void read_at(const call *call, int64_t row, int64_t head, int weights, const work *work) {
    int top = (int)call->layers - 1, at = 0;
    const real *x = work->query;
    for (int l = 0; l <= top; l++) {
        const layer *layer = &call->layer[l];
        real *y = work->query_z + at;
        apply((int)layer->out, (int)layer->in, of(weights ? &layer->weights : &layer->anchor, row, head), layer->in, x,
              y);
        if (l < top) {
            activate_each((enum activation)call->activation, padded((int)layer->out), y, y, NULL, NULL);
            at += padded((int)layer->out);
        }
        x = y;
    }
    int width = (int)call->layer[top].out;
    read_output(call, width, work, work->query_z + at, of(&call->y, row, head));
}

static void step_one(const call *call, int64_t row, int64_t head, const work *work) {
    int top = (int)call->layers - 1;
    if (call->mask && !call->mask[row * call->mask_row]) {
        copy(call, row, head);
        return;
    }
    double clip = bounds_of(call)->clip, threshold = bounds_of(call)->threshold;
    load(&call->k, row, head, call->layer[0].in, work->key);
    load(&call->q, row, head, call->layer[0].in, work->query);
    load(&call->v, row, head, call->layer[top].out, work->value);
    if (call->gain.data)
        load(&call->gain, row, head, call->layer[top].out, work->gain);
    int starts = call->position[row] % call->chunk == 0;
    double norm = differentiate(call, row, head, starts, work);
    /* error_l is half the gradient of the loss with respect to the output of layer l */
    double size = 2 * (double)*of(&call->theta, row, head);
    if (clip > 0 && 2 * norm > clip)
        size *= clip / (2 * norm) + 0 * norm; /* NaN where the norm overflows */
    int suppressed = 2 * norm < threshold; /* NaN is not suppressed */
    if (suppressed)
        size = 0;
    real retain = call->alpha.data && !suppressed ? 1 - *of(&call->alpha, row, head) : 1;
    real eta = call->eta.data ? *of(&call->eta, row, head) : 0;
    const real *input = work->key, *x = work->query;
    int at = 0;
    for (int l = 0; l <= top; l++) {
        const layer *layer = &call->layer[l];
        int out = (int)layer->out;
        real *error = work->error + at, *y = work->query_z + at;
        for (int i = 0; i < out; i += WIDTH)
            store_vec(error + i, load_vec(error + i) * (real)size);
        update_any(out, (int)layer->in, call->read == AFTER, retain, eta, error, input, of(&layer->weights, row, head),
                   layer->momentum.data ? of(&layer->momentum, row, head) : NULL, of(&layer->new_weights, row, head),
                   layer->momentum.data ? of(&layer->new_momentum, row, head) : NULL, x, y);
        if (l < top)
            activate_each((enum activation)call->activation, padded(out), y, y, NULL, NULL);
        input = work->input + at, x = y;
        at += padded(out);
    }
    int width = (int)call->layer[top].out;
    if (call->read == ANCHOR)
        read_at(call, row, head, starts, work);
    else
        read_output(call, width, work, work->query_z + at - padded(width), of(&call->y, row, head));
}

static void read_one(const call *call, int64_t row, int64_t head, const work *work) {
    load(&call->q, row, head, call->layer[0].in, work->query);
    if (call->gain.data)
        load(&call->gain, row, head, call->layer[call->layers - 1].out, work->gain);
    read_at(call, row, head, 1, work);
}

/* -- all of them ---------------------------------------------------------------------------------------------------- */

struct all {
    const call *call;
    const work *work; /* one for each thread */
};

static void step_part(const void *context, int64_t i, int worker) {
    const struct all *all = context;
    step_one(all->call, i / all->call->heads, i % all->call->heads, &all->work[worker]);
}

static void read_part(const void *context, int64_t i, int worker) {
    const struct all *all = context;
    read_one(all->call, i / all->call->heads, i % all->call->heads, &all->work[worker]);
}

static int run(const call *call, part *part) {
    size_t numbers = take_work(call, NULL, NULL);
    work work[call->threads];
    real *scratch = aligned_alloc(64, call->threads * numbers * sizeof(real));
    if (!scratch)
        return 1;
    for (int i = 0; i < call->threads; i++)
        take_work(call, scratch + i * numbers, &work[i]);
    struct all all = {call, work};
    share_out(call->threads, call->batch * call->heads, part, &all);
    free(scratch);
    return 0;
}

/* One token of each row. Returns 0, or 1: out of memory. */
int memory_step(const call *call) { return run(call, step_part); }

/* One query of each row at fixed weights. */
int memory_step_read(const call *call) { return run(call, read_part); }
