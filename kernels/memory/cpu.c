/* The memory operation on a CPU, forward and backward: every batch row and head on its own, chunk after chunk, with
   all of a chunk's work in the cache of one core.

   Forward keeps, for backward, the state every `every` chunks and, where told to, the layers' outputs for the queries:
   those for the keys are found again for less than keeping them costs. Backward takes these groups of chunks from the last to the first: it learns a group's chunks again from the
   state that was kept, and then differentiates them one by one in reverse. */

#include "network.h"
#include "cpu_runtime/tensors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

typedef struct {
    int64_t batch, time, heads, layers, chunk, activation, momentum, normed, after;
    int64_t every, asked_kept;
    int64_t widths[LAYERS + 1];
    double clip;
    tokens q, k, v, theta, eta, alpha, y;
    tokens grad_q, grad_k, grad_v, grad_theta, grad_eta, grad_alpha, grad_y;
    real *gain, *grad_gain; /* [heads, d_out], [batch, heads, d_out] */
    matrices before[3][LAYERS], end[3][LAYERS]; /* weights, momentum, anchor; null: not wanted */
    matrices grad_before[3][LAYERS], grad_end[3][LAYERS];
    int64_t *phase;         /* [batch]: where in its chunk each row stands */
    int32_t *order, *count; /* [batch, time], [batch]: the tokens each row has; null: all */
    real *kept, *scratch;
    int64_t kept_numbers, scratch_numbers; /* of one row and head; of one thread */
} call;

/* -- room ----------------------------------------------------------------------------------------------------------- */

typedef struct {
    real *next;
    size_t used;
} arena;

static real *take(arena *arena, size_t numbers) {
    size_t line = 64 / sizeof(real);
    real *found = arena->next ? arena->next + arena->used : NULL;
    arena->used += (numbers + line - 1) / line * line;
    return found;
}

static network describe(const call *call) {
    network net = {.layers = (int)call->layers,
                   .parts = call->momentum ? 2 : 1,
                   .most = (int)(call->chunk < call->time ? call->chunk : call->time),
                   .normed = (int)call->normed,
                   .after = (int)call->after,
                   .activation = (enum activation)call->activation,
                   .clip = (real)call->clip};
    net.ld = padded(net.most);
    for (int l = 0; l < net.layers; l++) {
        net.in[l] = (int)call->widths[l];
        net.out[l] = (int)call->widths[l + 1];
        net.rows[l] = padded(net.in[l]);
        net.width[l] = padded(net.out[l]);
    }
    return net;
}

static void take_chunk(const network *net, arena *room, chunk *c) {
    for (int l = 0; l < net->layers; l++) {
        size_t size = (size_t)net->most * net->width[l];
        c->state[l] = take(room, (size_t)net->parts * net->rows[l] * net->width[l]);
        c->z[l] = take(room, size);
        c->error[l] = take(room, size);
        c->pulled[l] = take(room, size);
    }
    c->scale = take(room, net->ld);
    c->square = take(room, net->ld);
}

static void take_work(const network *net, arena *room, work *w, int backward) {
    int n = net->most, ld = net->ld, parts = net->parts, top = net->layers - 1, widest = 0;
    size_t square = (size_t)n * ld;
    for (int l = 0; l < net->layers; l++)
        widest = most(widest, most(net->rows[l], net->width[l]));
    size_t tokens = (size_t)most(n, 4) * widest;
    w->keys = take(room, (size_t)n * net->rows[0]);
    w->queries = take(room, (size_t)n * net->rows[0]);
    w->values = take(room, (size_t)n * net->width[top]);
    real **vectors[] = {&w->theta, &w->alpha, &w->decay.keep, &w->decay.eta, &w->decay.A, &w->decay.E, &w->decay.m,
                        &w->step, &w->last, &w->last_momentum, &w->carry, &w->carry_momentum};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
        *vectors[i] = take(room, ld);
    w->decay.C = take(room, square);
    w->decay.H = take(room, square);
    w->read = take(room, square);
    w->scores = take(room, square);
    for (int l = 0; l < net->layers; l++) {
        w->input[l] = l ? take(room, (size_t)n * net->rows[l]) : NULL;
        w->slope[l] = take(room, (size_t)n * net->width[l]);
        w->reversed[l] = take(room, (size_t)parts * net->rows[l] * padded(net->out[l]));
        w->anchor[l] = take(room, (size_t)net->rows[l] * net->width[l]);
        w->anchor_reversed[l] = take(room, (size_t)net->rows[l] * padded(net->out[l]));
        w->asked[l] = take(room, (size_t)n * net->width[l]);
    }
    w->gain = take(room, net->width[top]);
    w->x = take(room, tokens);
    w->shared = take(room, (size_t)parts * tokens);
    w->weighed = take(room, tokens);
    w->weighed_momentum = take(room, tokens);
    w->turned = take(room, (size_t)widest * ld);
    if (!backward)
        return;
    for (int l = 0; l < net->layers; l++) {
        size_t state = (size_t)net->rows[l] * net->width[l];
        w->curvature[l] = take(room, (size_t)n * net->width[l]);
        w->grad_state[l] = take(room, parts * state);
        w->grad_reversed[l] = take(room, (size_t)parts * net->rows[l] * padded(net->out[l]));
        w->grad_anchor[l] = take(room, state);
        w->grad_input[l] = take(room, (size_t)n * net->rows[l]);
        w->grad_error[l] = take(room, (size_t)n * net->width[l]);
    }
    w->x_slope = take(room, tokens);
    w->g = take(room, tokens);
    w->back = take(room, tokens);
    w->grad_values = take(room, (size_t)n * net->width[top]);
    w->grad_queries = take(room, (size_t)n * net->rows[0]);
    w->grad_gain = take(room, net->width[top]);
    w->mixed = take(room, square);
    w->grad_read = take(room, square);
    w->grad_scores = take(room, square);
    w->decay_grad.C = take(room, square);
    real **grads[] = {&w->grad_theta, &w->grad_alpha, &w->grad_eta, &w->grad_carry, &w->grad_carry_momentum,
                      &w->grad_last, &w->grad_last_momentum, &w->grad_step, &w->decay_grad.A, &w->decay_grad.m,
                      &w->decay_grad.H, &w->decay_grad.row};
    for (size_t i = 0; i < sizeof grads / sizeof *grads; i++)
        *grads[i] = take(room, ld + 1);
}

/* -- what is kept for backward -------------------------------------------------------------------------------------- */

typedef struct {
    real *states, *asked;
} kept;

static int64_t most_pieces(const call *call) {
    int64_t found = 0;
    for (int64_t row = 0; row < call->batch; row++) {
        int64_t count = call->count ? call->count[row] : call->time, pieces;
        pieces = (call->phase[row] + count + call->chunk - 1) / call->chunk;
        found = pieces > found ? pieces : found;
    }
    return found;
}

static kept kept_of(const call *call, const network *net, real *start, size_t *numbers) {
    arena room = {start, 0};
    kept found = {0};
    if (call->every) {
        int64_t states = (most_pieces(call) - 1) / call->every; /* the first was given, and is at hand again */
        found.states = take(&room, states * state_numbers(net));
        found.asked = call->asked_kept ? take(&room, (size_t)call->time * outputs(net)) : NULL;
    }
    if (numbers)
        *numbers = room.used;
    return found;
}

/* Where the layers' outputs for n tokens from `first` on are kept. */
static void locate(const network *net, real *start, int first, int n, real **to) {
    real *next = start + (size_t)first * outputs(net);
    for (int l = 0; l < net->layers; l++) {
        to[l] = next;
        next += (size_t)n * net->width[l];
    }
}

/* -- one row and head ----------------------------------------------------------------------------------------------- */

typedef struct {
    const call *call;
    network net;
    int64_t row, head;
    int phase, count, pieces;
    int anchored; /* the anchor that was given counts: the row stands inside of a chunk, or does not move */
    kept kept;
} task;

static task begin(const call *call, int64_t index) {
    task t = {.call = call, .row = index / call->heads, .head = index % call->heads};
    t.net = describe(call);
    t.phase = (int)call->phase[t.row];
    t.count = (int)(call->count ? call->count[t.row] : call->time);
    t.pieces = (int)((t.phase + t.count + call->chunk - 1) / call->chunk);
    if (t.count == 0)
        t.pieces = 0;
    t.anchored = t.phase || t.count == 0;
    t.kept = kept_of(call, &t.net, call->kept ? call->kept + index * call->kept_numbers : NULL, NULL);
    return t;
}

static piece piece_of(const task *t, int i) {
    int chunk = (int)t->call->chunk, start = most(0, i * chunk - t->phase);
    return (piece){t->row, t->head, t->call->order ? t->call->order + t->row * t->call->time : NULL, start,
                   least(t->count, (i + 1) * chunk - t->phase) - start};
}

static void load_gain(task *t, work *w) {
    network *net = &t->net;
    int top = net->layers - 1, out = net->out[top];
    if (!t->call->gain)
        return;
    memset(w->gain, 0, net->width[top] * sizeof(real));
    memcpy(w->gain, t->call->gain + t->head * out, out * sizeof(real));
    net->gain = w->gain;
}

static void load_piece(const task *t, const piece *p, work *w) {
    const network *net = &t->net;
    const call *call = t->call;
    load(&call->k, p, net->in[0], w->keys);
    load(&call->q, p, net->in[0], w->queries);
    load(&call->v, p, net->out[net->layers - 1], w->values);
    load_gate(&call->theta, p, w->theta, 0);
    load_gate(&call->alpha, p, w->alpha, 0);
    load_gate(&call->eta, p, w->decay.eta, 0);
    find_decay(net, w, p->n);
}

/* The weights that a chunk's gradients are taken at, both ways round. */
typedef struct {
    real *const *straight, *const *reversed;
    int ld[LAYERS];
} anchor;

/* `whole`: also momentum, and the first layer, are wanted reversed */
static anchor anchor_of(const task *t, work *w, const chunk *c, int first, int whole) {
    const network *net = &t->net;
    int early = first && t->phase > 0;
    anchor found = {early ? w->anchor : c->state, early ? w->anchor_reversed : w->reversed, {0}};
    for (int l = 0; l < net->layers; l++) {
        int rows = net->rows[l], ld = (whole ? net->parts : 1) * rows;
        found.ld[l] = early ? rows : ld;
        if (early && (l || whole))
            transpose(rows, net->out[l], w->anchor[l], net->width[l], w->anchor_reversed[l], rows);
        if (whole || (l && !early))
            transpose(ld, net->out[l], c->state[l], net->width[l], w->reversed[l], ld);
    }
    return found;
}

static void load_states(const task *t, const matrices (*from)[LAYERS], real *const *state, real *const *anchor) {
    const network *net = &t->net;
    for (int l = 0; l < net->layers; l++) {
        size_t size = (size_t)net->rows[l] * net->width[l];
        if (state)
            for (int part = 0; part < net->parts; part++)
                load_matrix(net->in[l], net->out[l], &from[part][l], t->row, t->head, state[l] + part * size);
        if (anchor)
            load_matrix(net->in[l], net->out[l], &from[2][l], t->row, t->head, anchor[l]);
    }
}

static void store_states(const task *t, const matrices (*to)[LAYERS], real *const *state) {
    const network *net = &t->net;
    for (int l = 0; l < net->layers; l++)
        for (int part = 0; part < net->parts; part++)
            store_matrix(net->in[l], net->out[l], &to[part][l], t->row, t->head,
                         state[l] + (size_t)part * net->rows[l] * net->width[l]);
}

static void store_anchor(const task *t, const matrices *to, real *const *weights) {
    for (int l = 0; l < t->net.layers; l++)
        if (to[l].data)
            store_matrix(t->net.in[l], t->net.out[l], &to[l], t->row, t->head, weights[l]);
}

static void keep_state(const network *net, const chunk *c, real *to, int restore) {
    for (int l = 0; l < net->layers; l++) {
        size_t size = (size_t)net->parts * net->rows[l] * net->width[l];
        if (restore)
            memcpy(c->state[l], to, size * sizeof(real));
        else
            memcpy(to, c->state[l], size * sizeof(real));
        to += size;
    }
}

/* -- forward -------------------------------------------------------------------------------------------------------- */

static void forward_task(const call *call, int64_t index, real *scratch) {
    task t = begin(call, index);
    const network *net = &t.net;
    arena room = {scratch, 0};
    work w = {0};
    chunk c = {0};
    take_work(net, &room, &w, 0);
    take_chunk(net, &room, &c);
    load_gain(&t, &w);
    load_states(&t, call->before, c.state, t.anchored ? w.anchor : NULL);
    int top = net->layers - 1;
    if (t.count == 0)
        store_anchor(&t, call->end[2], w.anchor);
    for (int i = 0; i < t.pieces; i++) {
        piece p = piece_of(&t, i);
        load_piece(&t, &p, &w);
        if (call->every && i && i % call->every == 0)
            keep_state(net, &c, t.kept.states + (i / call->every - 1) * state_numbers(net), 0);
        real *asked[LAYERS];
        memcpy(asked, w.asked, sizeof asked);
        if (t.kept.asked)
            locate(net, t.kept.asked, p.first, p.n, asked);
        anchor anchor = anchor_of(&t, &w, &c, i == 0, 0);
        learn(net, &w, &c, p.n, anchor.straight, anchor.reversed, anchor.ld);
        weigh(net, &w, &c, p.n);
        answer(net, &w, &c, p.n, asked);
        conclude(net, &w, p.n, asked[top], w.asked[top]);
        store(&call->y, &p, net->out[top], w.asked[top]);
        int ends = (t.phase + t.count) % call->chunk == 0;
        if (i == t.pieces - 1 && !ends)
            store_anchor(&t, call->end[2], anchor.straight);
        advance(net, &w, &c, p.n, c.state);
        if (i == t.pieces - 1 && ends)
            store_anchor(&t, call->end[2], c.state);
    }
    store_states(&t, call->end, c.state);
}

/* -- backward ------------------------------------------------------------------------------------------------------- */

static void add(const network *net, real *const *to, real *const *more) {
    for (int l = 0; l < net->layers; l++)
        for (int i = 0; i < net->rows[l] * net->width[l]; i += WIDTH)
            put(to[l] + i, get(to[l] + i) + get(more[l] + i));
}

static void backward_task(const call *call, int64_t index, real *scratch) {
    task t = begin(call, index);
    const network *net = &t.net;
    int top = net->layers - 1, every = (int)call->every;
    arena room = {scratch, 0};
    work w = {0};
    chunk group[every];
    real *last_anchor[LAYERS];
    take_work(net, &room, &w, 1);
    for (int i = 0; i < every; i++)
        take_chunk(net, &room, &group[i]);
    load_gain(&t, &w);
    memset(w.grad_gain, 0, net->width[top] * sizeof(real));
    load_states(&t, call->grad_end, w.grad_state, NULL);
    for (int l = 0; l < net->layers; l++) {
        size_t size = (size_t)net->rows[l] * net->width[l];
        memset(w.grad_anchor[l], 0, size * sizeof(real));
        last_anchor[l] = take(&room, size);
        if (call->grad_end[2][l].data)
            load_matrix(net->in[l], net->out[l], &call->grad_end[2][l], t.row, t.head, last_anchor[l]);
        else
            memset(last_anchor[l], 0, size * sizeof(real));
        if (t.anchored)
            load_matrix(net->in[l], net->out[l], &call->before[2][l], t.row, t.head, w.anchor[l]);
    }
    int ends = (t.phase + t.count) % call->chunk == 0;
    if (t.count && ends) /* the last anchor is the weights after everything */
        add(net, w.grad_state, last_anchor);
    else if (t.pieces <= 1 && t.anchored) /* it is the first one still */
        add(net, w.grad_anchor, last_anchor);

    for (int start = t.pieces ? (t.pieces - 1) / every * every : -1; start >= 0; start -= every) {
        int stop = least(start + every, t.pieces);
        if (start)
            keep_state(net, &group[0], t.kept.states + (start / every - 1) * state_numbers(net), 1);
        else
            load_states(&t, call->before, group[0].state, NULL);
        for (int i = start; i < stop; i++) { /* learn again */
            chunk *c = &group[i - start];
            piece p = piece_of(&t, i);
            load_piece(&t, &p, &w);
            anchor anchor = anchor_of(&t, &w, c, i == 0, i == stop - 1);
            learn(net, &w, c, p.n, anchor.straight, anchor.reversed, anchor.ld);
            weigh(net, &w, c, p.n);
            if (i < stop - 1)
                advance(net, &w, c, p.n, group[i - start + 1].state);
        }
        for (int i = stop - 1; i >= start; i--) {
            chunk *c = &group[i - start];
            piece p = piece_of(&t, i);
            anchor anchor = {0};
            if (i < stop - 1) { /* of the group's last chunk, all this is still there */
                load_piece(&t, &p, &w);
                anchor = anchor_of(&t, &w, c, i == 0, 1);
                weigh(net, &w, c, p.n);
                w.input[0] = w.keys;
            } else {
                int early = i == 0 && t.phase > 0;
                anchor.straight = early ? w.anchor : c->state;
                anchor.reversed = early ? w.anchor_reversed : w.reversed;
                for (int l = 0; l < net->layers; l++)
                    anchor.ld[l] = (early ? 1 : net->parts) * net->rows[l];
            }
            for (int l = 0; l < top; l++)
                activate_each(net->activation, p.n * net->width[l], c->z[l], w.input[l + 1], w.slope[l],
                              w.curvature[l]);
            real *asked[LAYERS];
            memcpy(asked, w.asked, sizeof asked);
            if (t.kept.asked)
                locate(net, t.kept.asked, p.first, p.n, asked);
            else
                answer(net, &w, c, p.n, asked);
            advance_backward(net, &w, c, p.n);
            load(&call->grad_y, &p, net->out[top], w.g);
            answer_backward(net, &w, c, p.n, asked);
            weigh_backward(net, &w, c, p.n);
            int early = i == 0 && t.phase > 0;
            learn_backward(net, &w, c, p.n, anchor.straight, anchor.reversed, anchor.ld,
                           early ? w.grad_anchor : w.grad_state);
            if (i == t.pieces - 1 && !ends && !early) /* the last anchor is this chunk's start */
                add(net, w.grad_state, last_anchor);
            store(&call->grad_k, &p, net->in[0], w.grad_input[0]);
            store(&call->grad_q, &p, net->in[0], w.grad_queries);
            store(&call->grad_v, &p, net->out[top], w.grad_values);
            store_gate(&call->grad_theta, &p, w.grad_theta);
            store_gate(&call->grad_eta, &p, w.grad_eta);
            store_gate(&call->grad_alpha, &p, w.grad_alpha);
        }
    }
    store_states(&t, call->grad_before, w.grad_state);
    store_anchor(&t, call->grad_before[2], w.grad_anchor);
    if (call->grad_gain)
        memcpy(call->grad_gain + index * net->out[top], w.grad_gain, net->out[top] * sizeof(real));
}

/* -- entry ---------------------------------------------------------------------------------------------------------- */

/* Numbers to be kept for one row and head, and of scratch for one thread. */
void memory_room(const call *call, int backward, int64_t *kept_numbers, int64_t *scratch_numbers) {
    network net = describe(call);
    size_t numbers;
    kept_of(call, &net, NULL, &numbers);
    arena room = {0};
    work w = {0};
    chunk c = {0};
    take_work(&net, &room, &w, backward);
    for (int64_t i = 0; i < (backward ? call->every : 1); i++)
        take_chunk(&net, &room, &c);
    for (int l = 0; l < net.layers; l++)
        take(&room, (size_t)net.rows[l] * net.width[l]);
    *kept_numbers = (int64_t)numbers;
    *scratch_numbers = (int64_t)room.used;
}

void memory_run(const call *call, int backward, int threads) {
    int64_t tasks = call->batch * call->heads;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        real *scratch = call->scratch + omp_get_thread_num() * call->scratch_numbers;
#else
        real *scratch = call->scratch;
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++)
            if (backward)
                backward_task(call, i, scratch);
            else
                forward_task(call, i, scratch);
    }
}
