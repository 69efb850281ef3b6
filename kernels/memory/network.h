/* One head's memory network over one chunk: learning from its keys and values, answering its queries, moving on to the
   next chunk's state, and the derivatives of all that.

   A layer's state is kept transposed, weights [in, out] and momentum [in, out] below, as one matrix of `parts` blocks
   of rows: so both are a right factor for what runs forward. A copy the other way round is made for what runs back.
   Errors d are half gradients; the factor 2 is in the step. */

#pragma once

#include "cpu_runtime/activation.h"
#include "decay.h"
#include "layer_norm.h"
#include "cpu_runtime/matrix.h"

enum { LAYERS = 16, BLOCK = 16 /* tokens of a triangular product worked on together */ };

typedef struct {
    int layers, parts, most;  /* most: tokens in a chunk at most */
    int normed, after;        /* the network is residual with LayerNorm; a token is read after it was written */
    enum activation activation;
    real clip;                /* 0: none */
    int in[LAYERS], out[LAYERS];
    int rows[LAYERS];         /* in, padded: rows of a block of the state, and the width of what goes in */
    int width[LAYERS];        /* out, padded */
    int ld;                   /* most, padded */
    const real *gain;         /* [width of the last layer] */
} network;

INLINE size_t state_numbers(const network *net) {
    size_t total = 0;
    for (int l = 0; l < net->layers; l++)
        total += (size_t)net->parts * net->rows[l] * net->width[l];
    return total;
}

INLINE int outputs(const network *net) { /* numbers that the layers put out for one token */
    int total = 0;
    for (int l = 0; l < net->layers; l++)
        total += net->width[l];
    return total;
}

/* A chunk as it was learned: what is needed to go on from it and to differentiate it. */
typedef struct {
    real *state[LAYERS];   /* at its start, [parts * rows, width] */
    real *z[LAYERS];       /* outputs of the layers for the keys, [n, width] */
    real *error[LAYERS];   /* d, [n, width] */
    real *pulled[LAYERS];  /* what arrived at the activation from above: d W of the next layer, [n, width] */
    real *scale;           /* [n]: what brings a token's gradient down to `clip` */
    real *square;          /* [n]: that gradient's square */
} chunk;

/* What is worked with on one chunk at a time. */
typedef struct {
    real *keys, *values, *queries;                   /* [n, rows[0]] or [n, last width] */
    real *theta, *alpha, *grad_theta, *grad_alpha, *grad_eta;
    decay decay;
    real *step, *last, *last_momentum;               /* step_s; what it weighs in the weights and momentum at the end */
    real *read, *carry, *carry_momentum;             /* read's matrix [n, ld], and what a read takes of the start */
    real *input[LAYERS], *slope[LAYERS], *curvature[LAYERS]; /* for the keys: a_l [n, rows]; at z_l [n, width] */
    real *reversed[LAYERS];                          /* state transposed: [out, parts * rows] */
    real *anchor[LAYERS], *anchor_reversed[LAYERS];  /* of a chunk that began in an earlier call */
    real *asked[LAYERS];                             /* outputs of the layers for the queries, [n, width] */
    real *gain;
    real *x, *x_slope, *weighed, *weighed_momentum, *shared, *scores, *mixed, *turned; /* temporaries */
    /* backward */
    real *grad_state[LAYERS], *grad_reversed[LAYERS], *grad_anchor[LAYERS];
    real *grad_input[LAYERS], *grad_error[LAYERS];
    real *grad_read, *grad_scores, *grad_carry, *grad_carry_momentum, *grad_last, *grad_last_momentum;
    decay_grad decay_grad;
    real *g, *back, *grad_values, *grad_queries, *grad_gain, *grad_step;
} work;

/* -- gates ---------------------------------------------------------------------------------------------------------- */

static void find_decay(const network *net, work *w, int n) {
    decay *decay = &w->decay;
    decay->n = n;
    decay->ld = net->ld;
    decay->momentum = net->parts == 2;
    for (int t = 0; t < n; t++)
        decay->keep[t] = 1 - w->alpha[t];
    decay_matrices(decay);
}

/* The matrices with the step in them, once it is known how far every token's gradient is clipped. */
static void weigh(const network *net, work *w, const chunk *c, int n) {
    const decay *decay = &w->decay;
    int ld = net->ld, delay = !net->after;
    memset(w->step, 0, ld * sizeof(real));
    for (int s = 0; s < n; s++)
        w->step[s] = 2 * w->theta[s] * c->scale[s];
    for (int t = 0; t < n; t++) {
        int from = t - delay; /* read before it is written, a token finds what its predecessor left */
        w->carry[t] = from < 0 ? 1 : decay->A[from];
        w->carry_momentum[t] = from < 0 ? 0 : decay->m[from];
        for (int s = 0; s < ld; s += WIDTH)
            put(w->read + t * ld + s, from < 0 ? (vec){} : get(decay->C + from * ld + s) * get(w->step + s));
    }
    for (int s = 0; s < ld; s += WIDTH) {
        put(w->last + s, get(decay->C + (n - 1) * ld + s) * get(w->step + s));
        put(w->last_momentum + s, get(decay->H + (n - 1) * ld + s) * get(w->step + s));
    }
}

/* From the gradients of those matrices to the gates', and through the clipping to the errors' and inputs'. */
static void weigh_backward(const network *net, work *w, const chunk *c, int n) {
    decay *decay = &w->decay;
    decay_grad *g = &w->decay_grad;
    int ld = net->ld, delay = !net->after;
    memset(g->A, 0, ld * sizeof(real));
    memset(g->m, 0, ld * sizeof(real));
    memset(g->C, 0, (size_t)n * ld * sizeof(real));
    memset(w->grad_step, 0, ld * sizeof(real));
    for (int t = delay; t < n; t++) {
        g->A[t - delay] = w->grad_carry[t];
        g->m[t - delay] = w->grad_carry_momentum[t];
        real *to = g->C + (t - delay) * ld;
        const real *from = w->grad_read + t * ld, *C = decay->C + (t - delay) * ld;
        for (int s = 0; s < ld; s += WIDTH) {
            put(w->grad_step + s, get(w->grad_step + s) + get(from + s) * get(C + s));
            put(to + s, get(from + s) * get(w->step + s));
        }
    }
    int end = n - 1;
    g->A[end] += w->grad_carry[n]; /* what the state at the end takes of the one at the start */
    g->m[end] += w->grad_carry_momentum[n];
    for (int s = 0; s < ld; s += WIDTH) {
        vec step = get(w->step + s), last = get(w->grad_last + s), momentum = get(w->grad_last_momentum + s);
        vec C = get(decay->C + end * ld + s), H = get(decay->H + end * ld + s);
        put(w->grad_step + s, get(w->grad_step + s) + last * C + momentum * H);
        put(g->C + end * ld + s, get(g->C + end * ld + s) + last * step);
        put(g->H + s, momentum * step);
    }
    decay_backward(decay, g, w->grad_alpha, w->grad_eta);
    for (int s = 0; s < n; s++)
        w->grad_theta[s] = 2 * c->scale[s] * w->grad_step[s];
    if (net->clip == 0)
        return;
    for (int s = 0; s < n; s++) {
        if (!(c->scale[s] < 1))
            continue;
        /* d scale / d square = -scale / (2 square), and square is 4 sum |d|^2 |a|^2 */
        real grad_square = -4 * 2 * w->theta[s] * w->grad_step[s] * c->scale[s] / c->square[s];
        for (int l = 0; l < net->layers; l++) {
            const real *a = w->input[l] + s * net->rows[l], *d = c->error[l] + s * net->width[l];
            real *grad_a = w->grad_input[l] + s * net->rows[l], *grad_d = w->grad_error[l] + s * net->width[l];
            vec aa = {}, dd = {};
            for (int i = 0; i < net->rows[l]; i += WIDTH)
                aa += get(a + i) * get(a + i);
            for (int i = 0; i < net->width[l]; i += WIDTH)
                dd += get(d + i) * get(d + i);
            real to_d = grad_square * sum(aa), to_a = grad_square * sum(dd);
            for (int i = 0; i < net->rows[l]; i += WIDTH)
                put(grad_a + i, get(grad_a + i) + get(a + i) * to_a);
            for (int i = 0; i < net->width[l]; i += WIDTH)
                put(grad_d + i, get(grad_d + i) + get(d + i) * to_d);
        }
    }
}

/* -- learn ---------------------------------------------------------------------------------------------------------- */

/* Keys forward through the anchor and half errors back: fills the chunk (its state apart) and the inputs and slopes.
   `anchor` [in, out] and `reversed` [out, ldr] are the weights the gradients are taken at;
   of the latter the first layer is not needed. */
static void learn(const network *net, work *w, chunk *c, int n, real *const *anchor, real *const *reversed,
                  const int *ldr) {
    int top = net->layers - 1;
    w->input[0] = w->keys;
    for (int l = 0; l <= top; l++) {
        int width = net->width[l];
        multiply(n, width, net->in[l], w->input[l], net->rows[l], anchor[l], width, c->z[l], width, SET);
        if (l < top)
            activate_each(net->activation, n * width, c->z[l], w->input[l + 1], w->slope[l], NULL);
    }
    int width = net->width[top];
    for (int t = 0; t < n; t++) {
        real *d = c->error[top] + t * width;
        const real *z = c->z[top] + t * width, *v = w->values + t * width;
        if (net->normed)
            norm_error(net->out[top], w->keys + t * width, v, net->gain, z, w->x, d);
        else
            for (int i = 0; i < width; i += WIDTH)
                put(d + i, get(z + i) - get(v + i));
    }
    for (int l = top - 1; l >= 0; l--) {
        multiply(n, net->width[l], net->out[l + 1], c->error[l + 1], net->width[l + 1], reversed[l + 1], ldr[l + 1],
                 c->pulled[l], net->width[l], SET);
        for (int i = 0; i < n * net->width[l]; i += WIDTH)
            put(c->error[l] + i, get(c->pulled[l] + i) * get(w->slope[l] + i));
    }
    for (int t = 0; t < n; t++) {
        c->scale[t] = 1;
        if (net->clip == 0)
            continue;
        real square = 0;
        for (int l = 0; l <= top; l++) {
            vec aa = {}, dd = {};
            for (int i = 0; i < net->rows[l]; i += WIDTH)
                aa += get(w->input[l] + t * net->rows[l] + i) * get(w->input[l] + t * net->rows[l] + i);
            for (int i = 0; i < net->width[l]; i += WIDTH)
                dd += get(c->error[l] + t * net->width[l] + i) * get(c->error[l] + t * net->width[l] + i);
            square += sum(aa) * sum(dd);
        }
        c->square[t] = square *= 4;
        if (square > net->clip * net->clip)
            c->scale[t] = net->clip / (real)sqrt((double)square);
    }
}

/* What the errors weigh in the weights (and momentum) at the end: [n, width] each. */
static void weigh_errors(const network *net, work *w, const chunk *c, int n, int l) {
    int width = net->width[l];
    for (int s = 0; s < n; s++)
        for (int i = 0; i < width; i += WIDTH) {
            vec d = get(c->error[l] + s * width + i);
            put(w->weighed + s * width + i, d * w->last[s]);
            if (net->parts == 2)
                put(w->weighed_momentum + s * width + i, d * w->last_momentum[s]);
        }
}

/* The state after the chunk, in `to`, which may be where the state before it is. */
static void advance(const network *net, work *w, const chunk *c, int n, real *const *to) {
    real A = w->decay.A[n - 1], E = w->decay.E[n - 1], m = w->decay.m[n - 1];
    for (int l = 0; l < net->layers; l++) {
        int width = net->width[l], size = net->rows[l] * width;
        const real *from = c->state[l];
        if (net->parts == 2)
            for (int i = 0; i < size; i += WIDTH) {
                vec weight = get(from + i), momentum = get(from + size + i);
                put(to[l] + i, weight * A + momentum * m);
                put(to[l] + size + i, momentum * E);
            }
        else
            for (int i = 0; i < size; i += WIDTH)
                put(to[l] + i, get(from + i) * A);
        weigh_errors(net, w, c, n, l);
        multiply_transposed(net->in[l], width, n, w->input[l], net->rows[l], w->weighed, width, to[l], width, SUBTRACT);
        if (net->parts == 2)
            multiply_transposed(net->in[l], width, n, w->input[l], net->rows[l], w->weighed_momentum, width,
                                to[l] + size, width, SUBTRACT);
    }
}

/* -- answer --------------------------------------------------------------------------------------------------------- */

/* [A x | m x]: what of the state at the start a read takes, multiplied into what it asks with */
static void carry(const network *net, const work *w, int n, int l, const real *x, real *shared) {
    int rows = net->rows[l];
    for (int t = 0; t < n; t++) {
        real *to = shared + (size_t)t * net->parts * rows;
        for (int i = 0; i < rows; i += WIDTH) {
            vec xi = get(x + t * rows + i);
            put(to + i, xi * w->carry[t]);
            if (net->parts == 2)
                put(to + rows + i, xi * w->carry_momentum[t]);
        }
    }
}

/* All queries, each at the weights its token left (or found): the layers' outputs in `asked`. */
static void answer(const network *net, work *w, const chunk *c, int n, real *const *asked) {
    int ld = net->ld;
    const real *x = w->queries;
    for (int l = 0; l < net->layers; l++) {
        int rows = net->rows[l], width = net->width[l], long_ = net->parts * rows;
        if (l) {
            activate_each(net->activation, n * rows, asked[l - 1], w->x, NULL, NULL);
            x = w->x;
        }
        carry(net, w, n, l, x, w->shared);
        multiply(n, width, long_, w->shared, long_, c->state[l], width, asked[l], width, SET);
        transpose(n, net->in[l], w->input[l], rows, w->turned, ld);
        for (int t = 0; t < n; t += BLOCK) { /* a token takes from those before it, a block from the blocks before it */
            int count = least(n - t, BLOCK), seen = least(t + BLOCK, n);
            real *scores = w->scores + t * ld;
            const real *weights = w->read + t * ld;
            multiply(count, padded(seen), net->in[l], x + t * rows, rows, w->turned, ld, scores, ld, SET);
            for (int r = 0; r < count; r++)
                for (int s = 0; s < padded(seen); s += WIDTH)
                    put(scores + r * ld + s, get(scores + r * ld + s) * get(weights + r * ld + s));
            multiply(count, width, seen, scores, ld, c->error[l], width, asked[l] + t * width, width, SUBTRACT);
        }
    }
}

/* y, [n, last width], from the last layer's output; may write over it */
static void conclude(const network *net, work *w, int n, const real *z, real *y) {
    int top = net->layers - 1, width = net->width[top];
    for (int t = 0; t < n; t++, z += width, y += width)
        if (net->normed) {
            normalise(net->out[top], z, w->x);
            for (int i = 0; i < width; i += WIDTH)
                put(y + i, get(w->queries + t * width + i) + get(w->x + i) * get(net->gain + i));
        } else
            memmove(y, z, width * sizeof(real));
}

/* -- backward ------------------------------------------------------------------------------------------------------- */

/* Through `advance`. `grad_state` is that of the state at the end and becomes that of the one at the start; sets the
   gradients of inputs and errors and those of what a token weighs at the end. */
static void advance_backward(const network *net, work *w, const chunk *c, int n) {
    real A = w->decay.A[n - 1], E = w->decay.E[n - 1], m = w->decay.m[n - 1];
    double grad_A = 0, grad_m = 0, grad_E = 0;
    memset(w->grad_last, 0, net->ld * sizeof(real));
    memset(w->grad_last_momentum, 0, net->ld * sizeof(real));
    for (int l = 0; l < net->layers; l++) {
        int rows = net->rows[l], width = net->width[l], size = rows * width, two = net->parts == 2;
        real *grad = w->grad_state[l], *felt = w->g, *felt_momentum = w->back;
        const real *from = c->state[l];
        multiply(n, width, net->in[l], w->input[l], rows, grad, width, felt, width, SET);
        if (two)
            multiply(n, width, net->in[l], w->input[l], rows, grad + size, width, felt_momentum, width, SET);
        for (int s = 0; s < n; s++) {
            vec along = {}, along_momentum = {};
            real last = w->last[s], last_momentum = w->last_momentum[s];
            for (int i = s * width; i < (s + 1) * width; i += WIDTH) {
                vec d = get(c->error[l] + i), f = get(felt + i), to_d = f * -last;
                along += d * f;
                put(w->weighed + i, d * last);
                if (two) {
                    vec fm = get(felt_momentum + i);
                    along_momentum += d * fm;
                    to_d -= fm * last_momentum;
                    put(w->weighed_momentum + i, d * last_momentum);
                }
                put(w->grad_error[l] + i, to_d);
            }
            w->grad_last[s] -= sum(along);
            w->grad_last_momentum[s] -= sum(along_momentum);
        }
        int ldr = net->parts * rows;
        transpose(net->parts * rows, net->out[l], grad, width, w->grad_reversed[l], ldr);
        memset(w->grad_input[l], 0, (size_t)n * rows * sizeof(real));
        multiply(n, rows, net->out[l], w->weighed, width, w->grad_reversed[l], ldr, w->grad_input[l], rows, SUBTRACT);
        if (two)
            multiply(n, rows, net->out[l], w->weighed_momentum, width, w->grad_reversed[l] + rows, ldr,
                     w->grad_input[l], rows, SUBTRACT);
        for (int row = 0; row < size; row += width) { /* sums that cancel: short ones, added up in double */
            vec to_A = {}, to_m = {}, to_E = {};
            for (int i = row; i < row + width; i += WIDTH) {
                vec g = get(grad + i);
                to_A += g * get(from + i);
                if (two) {
                    vec gm = get(grad + size + i), momentum = get(from + size + i);
                    to_m += g * momentum;
                    to_E += gm * momentum;
                    put(grad + size + i, g * m + gm * E);
                }
                put(grad + i, g * A);
            }
            grad_A += sum(to_A);
            grad_m += sum(to_m);
            grad_E += sum(to_E);
        }
    }
    w->grad_carry[n] = (real)grad_A;
    w->grad_carry_momentum[n] = (real)grad_m;
    w->decay_grad.E = (real)grad_E;
}

/* Through `answer` and `conclude`, from the gradient of y in `g`; adds to the gradients of state, inputs and errors,
   sets those of the queries and of what a read weighs. */
static void answer_backward(const network *net, work *w, const chunk *c, int n, real *const *asked) {
    int ld = net->ld, top = net->layers - 1;
    real *g = w->g;
    memset(w->grad_read, 0, (size_t)n * ld * sizeof(real));
    memset(w->grad_carry, 0, n * sizeof(real));
    memset(w->grad_carry_momentum, 0, n * sizeof(real));
    if (net->normed) {
        int width = net->width[top];
        memcpy(w->grad_queries, g, (size_t)n * width * sizeof(real));
        for (int t = 0; t < n; t++) {
            real inverse = normalise(net->out[top], asked[top] + t * width, w->x), *gt = g + t * width;
            for (int i = 0; i < width; i += WIDTH) {
                put(w->grad_gain + i, get(w->grad_gain + i) + get(gt + i) * get(w->x + i));
                put(gt + i, get(gt + i) * get(net->gain + i));
            }
            pull(net->out[top], gt, w->x, inverse, gt);
        }
    } else
        memset(w->grad_queries, 0, (size_t)n * net->rows[0] * sizeof(real));
    for (int l = top; l >= 0; l--) {
        int rows = net->rows[l], width = net->width[l], long_ = net->parts * rows;
        const real *x = w->queries;
        if (l) {
            activate_each(net->activation, n * rows, asked[l - 1], w->x, w->x_slope, NULL);
            x = w->x;
        }
        /* the state's share */
        carry(net, w, n, l, x, w->shared);
        multiply_transposed(long_, width, n, w->shared, long_, g, width, w->grad_state[l], width, ADD);
        real *back = w->shared;
        multiply(n, long_, net->out[l], g, width, w->reversed[l], long_, back, long_, SET);
        /* the share of the chunk's own tokens */
        transpose(n, net->in[l], w->input[l], rows, w->turned, ld);
        for (int t = 0; t < n; t += BLOCK)
            multiply(least(n - t, BLOCK), padded(least(t + BLOCK, n)), net->in[l], x + t * rows, rows, w->turned, ld,
                     w->scores + t * ld, ld, SET);
        transpose(n, net->out[l], c->error[l], width, w->turned, ld);
        for (int t = 0; t < n; t += BLOCK) {
            int count = least(n - t, BLOCK), seen = least(t + BLOCK, n);
            multiply(count, padded(seen), net->out[l], g + t * width, width, w->turned, ld, w->grad_scores + t * ld, ld,
                     SET);
            for (int r = t; r < t + count; r++)
                for (int s = r * ld; s < r * ld + padded(seen); s += WIDTH) {
                    vec score = get(w->scores + s), felt = get(w->grad_scores + s), read = get(w->read + s);
                    put(w->grad_read + s, get(w->grad_read + s) - felt * score);
                    put(w->mixed + s, score * read);
                    put(w->grad_scores + s, felt * read); /* its sign is turned where it is used */
                }
        }
        for (int s = 0; s < n; s += BLOCK) { /* tokens that a block was read by: itself and those after it */
            int count = least(n - s, BLOCK);
            multiply_transposed(count, width, n - s, w->mixed + s * ld + s, ld, g + s * width, width,
                                w->grad_error[l] + s * width, width, SUBTRACT);
            multiply_transposed(count, rows, n - s, w->grad_scores + s * ld + s, ld, x + s * rows, rows,
                                w->grad_input[l] + s * rows, rows, SUBTRACT);
        }
        real *below = l ? w->g : w->grad_queries;
        /* g was used for the last time: what it becomes may take its place */
        for (int t = 0; t < n; t++) {
            vec along = {}, along_momentum = {};
            const real *from = back + (size_t)t * long_;
            for (int i = 0; i < rows; i += WIDTH) {
                vec xi = get(x + t * rows + i), b = get(from + i), total = b * w->carry[t];
                along += xi * b;
                if (net->parts == 2) {
                    vec bm = get(from + rows + i);
                    along_momentum += xi * bm;
                    total += bm * w->carry_momentum[t];
                }
                put(below + t * rows + i, l ? total : get(below + t * rows + i) + total);
            }
            w->grad_carry[t] += sum(along);
            w->grad_carry_momentum[t] += sum(along_momentum);
        }
        for (int t = 0; t < n; t += BLOCK)
            multiply(least(n - t, BLOCK), rows, least(t + BLOCK, n), w->grad_scores + t * ld, ld, w->input[l], rows,
                     below + t * rows, rows, SUBTRACT);
        if (l)
            for (int i = 0; i < n * rows; i += WIDTH)
                put(g + i, get(g + i) * get(w->x_slope + i));
    }
}

/* Through `learn`, once the gradients of inputs and errors are complete: a gradient's gradient. Adds to `onto`, the
   gradient of the anchor [in, out]; sets those of keys (grad_input[0]) and values. */
static void learn_backward(const network *net, work *w, const chunk *c, int n, real *const *anchor,
                           real *const *reversed, const int *ldr, real *const *onto) {
    int top = net->layers - 1;
    /* errors ran down the layers, so their gradient runs up ... */
    for (int l = 0; l < top; l++) {
        int width = net->width[l], wider = net->width[l + 1];
        real *g = w->grad_error[l];
        for (int i = 0; i < n * width; i += WIDTH) {
            vec gi = get(g + i);
            put(w->curvature[l] + i, gi * get(c->pulled[l] + i) * get(w->curvature[l] + i));
            put(g + i, gi * get(w->slope[l] + i));
        }
        multiply(n, wider, net->in[l + 1], g, width, anchor[l + 1], wider, w->grad_error[l + 1], wider, ADD);
        multiply_transposed(net->in[l + 1], wider, n, g, width, c->error[l + 1], wider, onto[l + 1], wider, ADD);
    }
    /* ... and then the inputs' gradient runs down */
    int width = net->width[top];
    real *g = w->g;
    for (int t = 0; t < n; t++) {
        int i = t * width;
        const real *grad = w->grad_error[top] + i;
        if (net->normed)
            norm_error_backward(net->out[top], w->keys + i, w->values + i, net->gain, c->z[top] + i, c->error[top] + i,
                                grad, g + i, w->grad_input[0] + i, w->grad_values + i, w->grad_gain, w->x);
        else
            for (int j = 0; j < width; j += WIDTH) {
                put(g + i + j, get(grad + j));
                put(w->grad_values + i + j, -get(grad + j));
            }
    }
    for (int l = top; l >= 0; l--) {
        int rows = net->rows[l], width = net->width[l];
        multiply_transposed(net->in[l], width, n, w->input[l], rows, g, width, onto[l], width, ADD);
        multiply(n, rows, net->out[l], g, width, reversed[l], ldr[l], w->grad_input[l], rows, ADD);
        if (l)
            for (int i = 0; i < n * rows; i += WIDTH)
                put(g + i, get(w->grad_input[l] + i) * get(w->slope[l - 1] + i) + get(w->curvature[l - 1] + i));
    }
}
