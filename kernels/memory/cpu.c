/* The memory operation on a CPU, forward and backward: every batch row and head on its own, chunk after chunk, with
   all of a chunk's work in the cache of one core.

   For backward, forward saves the state every `interval` chunks and, with `saves_activations`, the layers' outputs for
   the queries; those for the keys are cheaper to recompute than to save. Backward goes through these groups of chunks
   from the last to the first: it recomputes a group's chunks from the state that was saved, and then differentiates them one
   by one in reverse. */

#include "network.h"
#include "cpu_runtime/tensors.h"

#include <omp.h>
#include <stdlib.h>

typedef struct {
    int64_t batch, time, heads, layers, chunk, activation, loss, momentum, normed, read, gated, past, channels;
    int64_t backward, threads;
    int64_t interval, saves_activations, saved_numbers; /* of one row and head; interval = 0: nothing is saved */
    int64_t widths[LAYERS + 1];
    /* k, v, delta and gamma begin with the `past` writes before the tokens. All addresses are those of the first of these
       writes, so that what has none there begins `past` tokens later. */
    tokens q, k, v, theta, eta, alpha, delta, gamma, y;
    tokens grad_q, grad_k, grad_v, grad_theta, grad_eta, grad_alpha, grad_delta, grad_gamma, grad_y;
    real *gain, *grad_gain; /* [heads, d_out], [batch, heads, d_out] */
    int64_t *phase;         /* [batch]: each row's position in its chunk */
    int32_t *order, *count; /* [batch, past + time], [batch]: the writes and the tokens that each row has; null: all */
    int32_t *end_row;       /* [batch]: where in `end` and `grad_end` the row's state is; -1: it is not wanted */
    real *saved;
    matrices before[3][LAYERS], end[3][LAYERS]; /* weights, momentum, anchor; null: not wanted */
    matrices grad_before[3][LAYERS], grad_end[3][LAYERS]; /* grad_before: null: not wanted; grad_end: null: zero */
    double clip, loss_p, loss_delta, loss_smooth;
} call;

/* -- memory for the work -------------------------------------------------------------------------------------------- */

static network network_of(const call *call) {
    network net = {.layers = (int)call->layers,
                   .parts = call->momentum ? 2 : 1,
                   .longest = (int)(call->chunk < call->time ? call->chunk : call->time),
                   .past = (int)call->past,
                   .gated = (int)call->gated,
                   .channels = (int)call->channels,
                   .normed = (int)call->normed,
                   .read = (enum reading)call->read,
                   .activation = (enum activation)call->activation,
                   .objective = {(enum loss)call->loss, (real)call->loss_p, (real)call->loss_delta,
                                 (real)call->loss_smooth},
                   .clip = (real)call->clip};
    net.ld = padded(net.past + net.longest);
    for (int l = 0; l < net.layers; l++) {
        net.in[l] = (int)call->widths[l];
        net.out[l] = (int)call->widths[l + 1] + (net.gated && l == 0 ? padded((int)call->widths[1]) : 0);
        net.rows[l] = padded(net.in[l]);
        net.width[l] = padded(net.out[l]);
    }
    return net;
}

static void take_chunk(const network *net, arena *arena, chunk *c) {
    for (int l = 0; l < net->layers; l++) {
        size_t size = (size_t)(net->past + net->longest) * net->width[l];
        c->state[l] = take(arena, (size_t)net->parts * net->rows[l] * net->width[l]);
        c->z[l] = take(arena, size);
        c->error[l] = take(arena, size);
        c->upstream[l] = take(arena, size);
    }
    c->scale = take(arena, net->ld);
    c->norm = take(arena, net->ld);
}

static void take_work(const network *net, arena *arena, work *w, int backward) {
    int n = net->past + net->longest, ld = net->ld, parts = net->parts, top = net->layers - 1, widest = 0;
    size_t square = (size_t)net->longest * ld;
    for (int l = 0; l < net->layers; l++)
        widest = max(widest, max(net->rows[l], net->width[l]));
    size_t tokens = (size_t)max(n, NORM_ROWS) * widest;
    w->keys = take(arena, (size_t)n * net->rows[0]);
    w->queries = take(arena, (size_t)n * net->rows[0]);
    w->values = take(arena, (size_t)n * net->width[top]);
    real **vectors[] = {&w->theta, &w->alpha, &w->delta, &w->gamma, &w->decay.retain, &w->decay.eta, &w->decay.A,
                        &w->decay.E, &w->decay.m, &w->step, &w->last, &w->last_momentum, &w->carry, &w->carry_momentum};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
        *vectors[i] = take(arena, ld);
    w->decay.C = take(arena, square);
    w->decay.H = take(arena, square);
    w->read = take(arena, square);
    w->scores = take(arena, square);
    for (int l = 0; l < net->layers; l++) {
        w->input[l] = l ? take(arena, (size_t)n * net->rows[l]) : NULL;
        w->slope[l] = take(arena, (size_t)n * net->width[l]);
        w->transposed[l] = take(arena, (size_t)parts * net->rows[l] * padded(net->out[l]));
        w->anchor[l] = take(arena, (size_t)net->rows[l] * net->width[l]);
        w->anchor_transposed[l] = take(arena, (size_t)net->rows[l] * padded(net->out[l]));
        w->query_z[l] = take(arena, (size_t)n * net->width[l]);
    }
    for (int l = 0; net->channels && l < net->layers; l++) {
        size_t size = (size_t)(net->longest + 1) * net->rows[l];
        real **columns[] = {&w->keep[l], &w->kept[l], &w->moved[l], &w->grad_keep[l], &w->grad_kept[l], &w->grad_moved[l]};
        for (int i = 0; i < (backward ? 6 : 3); i++)
            *columns[i] = take(arena, size);
        w->decayed[l] = take(arena, (size_t)net->longest * n * net->rows[l]);
        w->grad_decayed[l] = backward ? take(arena, (size_t)n * net->rows[l]) : NULL;
    }
    w->gain = take(arena, net->width[top]);
    w->x = take(arena, tokens);
    w->carried = take(arena, (size_t)parts * tokens);
    w->weighted = take(arena, tokens);
    w->weighted_momentum = take(arena, tokens);
    w->columns = take(arena, (size_t)widest * ld);
    if (!backward)
        return;
    for (int l = 0; l < net->layers; l++) {
        size_t state = (size_t)net->rows[l] * net->width[l];
        w->curvature[l] = take(arena, (size_t)n * net->width[l]);
        w->grad_state[l] = take(arena, parts * state);
        w->grad_transposed[l] = take(arena, (size_t)parts * net->rows[l] * padded(net->out[l]));
        w->grad_anchor[l] = take(arena, state);
        w->grad_last_anchor[l] = take(arena, state);
        w->grad_input[l] = take(arena, (size_t)n * net->rows[l]);
        w->grad_error[l] = take(arena, (size_t)n * net->width[l]);
    }
    w->x_slope = take(arena, tokens);
    w->g = take(arena, tokens);
    w->back = take(arena, tokens);
    w->grad_values = take(arena, (size_t)n * net->width[top]);
    w->grad_queries = take(arena, (size_t)n * net->rows[0]);
    w->grad_gain = take(arena, net->width[top]);
    w->weighted_scores = take(arena, square);
    w->grad_read = take(arena, square);
    w->grad_scores = take(arena, square);
    w->decay_grad.C = take(arena, square);
    real **grads[] = {&w->grad_theta, &w->grad_alpha, &w->grad_eta, &w->grad_delta, &w->grad_gamma, &w->grad_carry,
                      &w->grad_carry_momentum, &w->grad_last, &w->grad_last_momentum, &w->grad_step, &w->decay_grad.A,
                      &w->decay_grad.m, &w->decay_grad.H, &w->decay_grad.row};
    for (size_t i = 0; i < sizeof grads / sizeof *grads; i++)
        *grads[i] = take(arena, ld + 1);
}

/* -- one row and head ----------------------------------------------------------------------------------------------- */

typedef struct {
    const call *call;
    network net;
    int64_t row, head, end; /* end: the row of the state at the end; -1: it is not wanted */
    int phase, count, chunks;
    int ends;                  /* the row ends with a whole chunk */
    int anchored;              /* the given anchor matters: the row is inside a chunk, or does not move */
    real *states, *activations; /* what is saved for backward */
} task;

static int chunks_of(const call *call, int64_t row) {
    int64_t count = call->count ? call->count[row] : call->time;
    return count ? (int)((call->phase[row] + count + call->chunk - 1) / call->chunk) : 0;
}

static task task_of(const call *call, int64_t index) {
    task t = {.call = call, .net = network_of(call), .row = index / call->heads, .head = index % call->heads};
    t.end = call->end_row[t.row];
    t.phase = (int)call->phase[t.row];
    t.count = (int)(call->count ? call->count[t.row] : call->time);
    t.chunks = chunks_of(call, t.row);
    t.ends = (t.phase + t.count) % call->chunk == 0;
    t.anchored = t.phase || t.count == 0;
    t.states = call->saved ? call->saved + index * call->saved_numbers : NULL;
    if (call->saves_activations)
        t.activations = t.states + call->saved_numbers - call->time * outputs(&t.net);
    return t;
}

/* Numbers that one row and head saves. The first state was given, and is available again. */
static int64_t saved_numbers(const call *call, const network *net) {
    int chunks = 1;
    for (int64_t row = 0; row < call->batch; row++)
        chunks = max(chunks, chunks_of(call, row));
    return call->interval ? (chunks - 1) / call->interval * (int64_t)state_numbers(net) +
                             (call->saves_activations ? call->time * outputs(net) : 0)
                       : 0;
}

/* Where the layers' outputs for the queries of n tokens from `first` on are: saved, or work. */
static void locate_query_z(const task *t, const work *w, int first, int n, real **query_z) {
    const network *net = &t->net;
    memcpy(query_z, w->query_z, sizeof w->query_z);
    if (!t->activations)
        return;
    real *next = t->activations + (size_t)first * outputs(net);
    for (int l = 0; l < net->layers; l++) {
        query_z[l] = next;
        next += (size_t)n * net->width[l];
    }
}

static piece tokens_of_chunk(const task *t, int i) {
    const call *call = t->call;
    int chunk = (int)call->chunk, start = max(0, i * chunk - t->phase);
    return (piece){t->row, t->head, call->order ? call->order + t->row * (call->past + call->time) : NULL,
                   (int)call->past + start, min(t->count, (i + 1) * chunk - t->phase) - start};
}

/* The writes whose gradients a chunk's steps go along: those of its tokens and those before. */
static piece writes_of_chunk(const task *t, const piece *p) {
    piece found = *p;
    found.first -= (int)t->call->past;
    found.n += (int)t->call->past;
    return found;
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

/* Those of layer l among the gates of all layers' columns */
static tokens channels_of(const network *net, const tokens *gates, int l) {
    tokens found = *gates;
    for (int i = 0; found.data && i < l; i++)
        found.data += net->in[i];
    return found;
}

static void load_tokens(const task *t, const piece *p, work *w) {
    const network *net = &t->net;
    const call *call = t->call;
    piece writes = writes_of_chunk(t, p);
    load(&call->k, &writes, net->in[0], w->keys);
    load(&call->q, p, net->in[0], w->queries);
    load(&call->v, &writes, net->out[net->layers - 1], w->values);
    load_gate(&call->theta, p, w->theta, 0);
    if (net->channels)
        for (int l = 0; l < net->layers; l++) {
            tokens alpha = channels_of(net, &call->alpha, l);
            load(&alpha, p, net->in[l], w->keep[l]);
            for (int i = 0; i < p->n * net->rows[l]; i += WIDTH)
                store_vec(w->keep[l] + i, 1 - load_vec(w->keep[l] + i));
        }
    else
        load_gate(&call->alpha, p, w->alpha, 0);
    load_gate(&call->eta, p, w->decay.eta, 0);
    load_gate(&call->delta, &writes, w->delta, net->objective.delta);
    load_gate(&call->gamma, &writes, w->gamma, 1);
    chunk_decay(net, w, p->n);
}

/* The weights that chunk i's gradients are taken at, and their transposes: those at its start, or the given anchor.
   whole: also transpose layer 0 and the momentum. cached: the transposes are up to date. */
static anchor anchor_of(const task *t, work *w, const chunk *c, int i, int whole, int cached) {
    const network *net = &t->net;
    int given = i == 0 && t->phase > 0;
    anchor found = {given ? w->anchor : c->state, given ? w->anchor_transposed : w->transposed, {0}};
    for (int l = 0; l < net->layers; l++) {
        int rows = net->rows[l], ld = (whole ? c->parts : 1) * rows;
        found.ld[l] = given ? rows : ld;
        if (cached)
            continue;
        if (given && (l || whole))
            transpose(rows, net->out[l], w->anchor[l], net->width[l], w->anchor_transposed[l], rows);
        if (whole || (l && !given))
            transpose(ld, net->out[l], c->state[l], net->width[l], w->transposed[l], ld);
    }
    return found;
}

/* One part of the state, or the anchor: its layers are `part` blocks of rows from where `layers` point. */
static void load_part(const task *t, const matrices *from, int64_t row, real *const *layers, int part) {
    const network *net = &t->net;
    for (int l = 0; l < net->layers + net->gated; l++) {
        int last = l == net->layers, layer = last ? 0 : l, out = (int)t->call->widths[layer + 1]; /* W_3 beside W_1 */
        load_matrix(net->in[layer], out, &from[l], row, t->head,
                    layers[layer] + (size_t)part * net->rows[layer] * net->width[layer] + last * padded(out),
                    net->width[layer]);
    }
}

/* and back, what is wanted */
static void store_part(const task *t, const matrices *to, int64_t row, real *const *layers, int part) {
    const network *net = &t->net;
    for (int l = 0; l < net->layers + net->gated; l++) {
        int last = l == net->layers, layer = last ? 0 : l, out = (int)t->call->widths[layer + 1];
        if (to[l].data)
            store_matrix(net->in[layer], out, &to[l], row, t->head,
                         layers[layer] + (size_t)part * net->rows[layer] * net->width[layer] + last * padded(out),
                         net->width[layer]);
    }
}

static void load_state(const task *t, const matrices (*from)[LAYERS], int64_t row, real *const *state) {
    for (int part = 0; part < t->net.parts; part++)
        load_part(t, from[part], row, state, part);
}

static void store_state(const task *t, const matrices (*to)[LAYERS], int64_t row, real *const *state) {
    for (int part = 0; part < t->net.parts; part++)
        store_part(t, to[part], row, state, part);
}

/* The parts of the state at the start of chunk i that its reads depend on, once its gates are loaded. Documents begin
   with zero momentum. A gate that is not finite makes zero momentum NaN. */
static int parts_read(const task *t, const work *w, const chunk *c, int i, int n) {
    const network *net = &t->net;
    if (i || net->parts == 1 || t->call->grad_before[1][0].data || !isfinite(w->decay.m[n - 1]))
        return net->parts;
    for (int l = 0; l < net->layers; l++) {
        int width = net->width[l], size = net->rows[l] * width;
        for (const real *x = c->state[l] + size; x < c->state[l] + 2 * size; x += width) {
            int found = 0;
            for (int o = 0; o < width; o++)
                found |= x[o] != 0;
            if (found)
                return 2;
        }
    }
    return 1;
}

static void copy_state(const network *net, real *const *state, real *saved, int restore) {
    for (int l = 0; l < net->layers; l++) {
        size_t size = (size_t)net->parts * net->rows[l] * net->width[l];
        memcpy(restore ? state[l] : saved, restore ? saved : state[l], size * sizeof(real));
        saved += size;
    }
}

/* -- forward -------------------------------------------------------------------------------------------------------- */

static void forward_task(const call *call, int64_t index, real *scratch) {
    task t = task_of(call, index);
    const network *net = &t.net;
    int top = net->layers - 1;
    arena arena = {scratch, 0};
    work w = {0};
    chunk c = {0};
    take_work(net, &arena, &w, 0);
    take_chunk(net, &arena, &c);
    load_gain(&t, &w);
    load_state(&t, call->before, t.row, c.state);
    if (t.anchored)
        load_part(&t, call->before[2], t.row, w.anchor, 0);
    if (t.count == 0 && t.end >= 0)
        store_part(&t, call->end[2], t.end, w.anchor, 0);
    for (int i = 0; i < t.chunks; i++) {
        piece p = tokens_of_chunk(&t, i);
        load_tokens(&t, &p, &w);
        c.parts = parts_read(&t, &w, &c, i, p.n);
        if (call->interval && i && i % call->interval == 0)
            copy_state(net, c.state, t.states + (i / call->interval - 1) * state_numbers(net), 0);
        real *query_z[LAYERS];
        locate_query_z(&t, &w, p.first - net->past, p.n, query_z);
        anchor anchor = anchor_of(&t, &w, &c, i, 0, 0);
        differentiate(net, &w, &c, p.n, &anchor);
        find_coefficients(net, &w, &c, p.n);
        decay_inputs(net, &w, p.n);
        read_chunk(net, &w, &c, p.n, &anchor, query_z);
        read_output(net, &w, p.n, query_z[top], w.query_z[top]);
        store(&call->y, &p, net->out[top], w.query_z[top]);
        int last = i == t.chunks - 1;
        if (last && t.end < 0)
            return;
        if (last && !t.ends)
            store_part(&t, call->end[2], t.end, anchor.weights, 0);
        write_chunk(net, &w, &c, p.n, c.state);
        if (last && t.ends)
            store_part(&t, call->end[2], t.end, c.state, 0);
    }
    if (t.end >= 0)
        store_state(&t, call->end, t.end, c.state);
}

/* -- backward ------------------------------------------------------------------------------------------------------- */

static void add(const network *net, real *const *to, real *const *more) {
    for (int l = 0; l < net->layers; l++)
        for (int i = 0; i < net->rows[l] * net->width[l]; i += WIDTH)
            store_vec(to[l] + i, load_vec(to[l] + i) + load_vec(more[l] + i));
}

/* Recompute the chunks start .. stop - 1 from the state that was saved at their start. */
static void recompute(const task *t, work *w, chunk *group, int start, int stop) {
    const call *call = t->call;
    const network *net = &t->net;
    if (start)
        copy_state(net, group[0].state, t->states + (start / call->interval - 1) * state_numbers(net), 1);
    else
        load_state(t, call->before, t->row, group[0].state);
    for (int i = start; i < stop; i++) {
        chunk *c = &group[i - start];
        piece p = tokens_of_chunk(t, i);
        load_tokens(t, &p, w);
        c->parts = parts_read(t, w, c, i, p.n);
        anchor anchor = anchor_of(t, w, c, i, i == stop - 1, 0);
        differentiate(net, w, c, p.n, &anchor);
        find_coefficients(net, w, c, p.n);
        decay_inputs(net, w, p.n);
        if (i < stop - 1)
            write_chunk(net, w, c, p.n, group[i - start + 1].state);
    }
}

/* What later chunks have added to the gradients of some writes, added to those of this chunk. */
static void add_later(const task *t, const piece *writes, work *w) {
    const call *call = t->call;
    for (int i = 0; i < writes->n; i++) {
        const real *k = token(&call->grad_k, writes, i), *v = token(&call->grad_v, writes, i);
        int top = t->net.layers - 1;
        for (int j = 0; j < t->net.in[0]; j++)
            w->grad_input[0][(size_t)i * t->net.rows[0] + j] += k[j];
        for (int j = 0; j < t->net.out[top]; j++)
            w->grad_values[(size_t)i * t->net.width[top] + j] += v[j];
        if (call->grad_delta.data)
            w->grad_delta[i] += *token(&call->grad_delta, writes, i);
        if (call->grad_gamma.data)
            w->grad_gamma[i] += *token(&call->grad_gamma, writes, i);
    }
}

static void backward_task(const call *call, int64_t index, real *scratch) {
    task t = task_of(call, index);
    const network *net = &t.net;
    int top = net->layers - 1, interval = (int)call->interval;
    arena arena = {scratch, 0};
    work w = {0};
    chunk group[interval];
    take_work(net, &arena, &w, 1);
    for (int i = 0; i < interval; i++)
        take_chunk(net, &arena, &group[i]);
    load_gain(&t, &w);
    memset(w.grad_gain, 0, net->width[top] * sizeof(real));
    int state_given = t.end >= 0 && call->grad_end[0][0].data, anchor_given = t.end >= 0 && call->grad_end[2][0].data;
    if (t.anchored)
        load_part(&t, call->before[2], t.row, w.anchor, 0);
    for (int l = 0; l < net->layers; l++) {
        size_t size = (size_t)net->rows[l] * net->width[l];
        memset(w.grad_anchor[l], 0, size * sizeof(real));
        if (!anchor_given)
            memset(w.grad_last_anchor[l], 0, size * sizeof(real));
        if (!state_given)
            memset(w.grad_state[l], 0, net->parts * size * sizeof(real));
    }
    if (state_given)
        load_state(&t, call->grad_end, t.end, w.grad_state);
    if (anchor_given)
        load_part(&t, call->grad_end[2], t.end, w.grad_last_anchor, 0);
    if (t.count && t.ends) /* the last anchor is the weights after everything */
        add(net, w.grad_state, w.grad_last_anchor);
    else if (t.chunks <= 1 && t.anchored) /* it is still the given one */
        add(net, w.grad_anchor, w.grad_last_anchor);

    for (int start = t.chunks ? (t.chunks - 1) / interval * interval : -1; start >= 0; start -= interval) {
        int stop = min(start + interval, t.chunks);
        recompute(&t, &w, group, start, stop);
        for (int i = stop - 1; i >= start; i--) {
            chunk *c = &group[i - start];
            piece p = tokens_of_chunk(&t, i);
            int given = i == 0 && t.phase > 0, cached = i == stop - 1; /* the last one was just recomputed */
            if (!cached) {
                load_tokens(&t, &p, &w);
                find_coefficients(net, &w, c, p.n);
                w.input[0] = w.keys;
            }
            anchor anchor = anchor_of(&t, &w, c, i, 1, cached);
            for (int l = 0; l < top; l++)
                activate_layer(net, l, p.n + net->past, c->z[l], w.input[l + 1], w.slope[l], w.curvature[l]);
            if (!cached)
                decay_inputs(net, &w, p.n);
            begin_backward(net, &w, p.n);
            real *query_z[LAYERS];
            locate_query_z(&t, &w, p.first - net->past, p.n, query_z);
            if (!t.activations)
                read_chunk(net, &w, c, p.n, &anchor, query_z);
            if (i == t.chunks - 1 && !state_given && !(anchor_given && t.ends))
                unread_chunk_backward(net, &w, p.n);
            else
                write_chunk_backward(net, &w, c, p.n);
            load(&call->grad_y, &p, net->out[top], w.g);
            real *const *grad_anchor = given ? w.grad_anchor : w.grad_state;
            read_chunk_backward(net, &w, c, p.n, &anchor, grad_anchor, query_z);
            coefficients_backward(net, &w, c, p.n);
            differentiate_backward(net, &w, c, p.n, &anchor, grad_anchor);
            if (i == t.chunks - 1 && !t.ends && !given) /* the last anchor is the weights at this chunk's start */
                add(net, w.grad_state, w.grad_last_anchor);
            piece writes = writes_of_chunk(&t, &p);
            if (net->past) /* they are writes of later chunks, too */
                add_later(&t, &writes, &w);
            store(&call->grad_k, &writes, net->in[0], w.grad_input[0]);
            store(&call->grad_q, &p, net->in[0], w.grad_queries);
            store(&call->grad_v, &writes, net->out[top], w.grad_values);
            store_gate(&call->grad_theta, &p, w.grad_theta);
            store_gate(&call->grad_eta, &p, w.grad_eta);
            for (int l = 0; net->channels && l < net->layers; l++) {
                tokens alpha = channels_of(net, &call->grad_alpha, l);
                store(&alpha, &p, net->in[l], w.grad_keep[l]);
            }
            if (!net->channels)
                store_gate(&call->grad_alpha, &p, w.grad_alpha);
            store_gate(&call->grad_delta, &writes, w.grad_delta);
            store_gate(&call->grad_gamma, &writes, w.grad_gamma);
        }
    }
    store_state(&t, call->grad_before, t.row, w.grad_state);
    store_part(&t, call->grad_before[2], t.row, w.grad_anchor, 0);
    if (call->grad_gain)
        memcpy(call->grad_gain + index * net->out[top], w.grad_gain, net->out[top] * sizeof(real));
}

/* -- entry ---------------------------------------------------------------------------------------------------------- */

/* Returns 1 if there is no memory for the work buffers, and 2 if `saved` is too small. */
int memory_run(const call *call) {
    network net = network_of(call);
    arena arena = {0};
    work w = {0};
    chunk c = {0};
    take_work(&net, &arena, &w, (int)call->backward);
    for (int64_t i = 0; i < (call->backward ? call->interval : 1); i++)
        take_chunk(&net, &arena, &c);
    if (saved_numbers(call, &net) > call->saved_numbers)
        return 2;
    real *scratch = aligned_alloc(64, call->threads * arena.used * sizeof(real));
    if (!scratch)
        return 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->threads)
    for (int64_t i = 0; i < call->batch * call->heads; i++) {
        real *own = scratch + omp_get_thread_num() * arena.used;
        if (call->backward)
            backward_task(call, i, own);
        else
            forward_task(call, i, own);
    }
    free(scratch);
    return 0;
}
