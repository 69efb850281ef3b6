/* One head's memory network over one chunk: the gradients of its tokens, its reads, the state after it, and the
   derivatives of all that.

   A layer's state is stored transposed, weights [in, out] and momentum [in, out] below, as one matrix of `parts` blocks
   of rows, so that both are a right factor in forward products; for products backward there is a copy [out, in].
   The error d_l is half the gradient of the loss with respect to z_l, the output of layer l. The factor 2 is in the
   step.

   A gated network W_2 (act(W_1 x) * (W_3 x)) has two layers: the outputs of the first are those of W_1 and W_3 side by
   side, and its activation makes one of two. With a window, a chunk's gradients are those of its own tokens and of the
   `past` writes before them: `writes` counts both. */

#pragma once

#include "cpu_runtime/activation.h"
#include "decay.h"
#include "layer_norm.h"
#include "cpu_runtime/matrix.h"
#include "cpu_runtime/matvec.h"

enum { LAYERS = 16, BLOCK = 16 /* tokens of a triangular product worked on together */ };

/* At which weights a token is read: those before it was written, after it, or at its chunk's start. */
enum reading { BEFORE, AFTER, ANCHOR };

typedef struct {
    int layers, parts, longest; /* parts: 2, or 1 without momentum; longest: most tokens in a chunk */
    int past;                 /* writes before a token that are in its window */
    int gated;
    int normed;               /* the network is residual with LayerNorm */
    enum reading read;
    enum activation activation;
    objective objective;
    real clip;                /* 0: none */
    int in[LAYERS], out[LAYERS];
    int rows[LAYERS];         /* in, padded: rows of a block of the state, and the width of the layer's input */
    int width[LAYERS];        /* out, padded */
    int ld;                   /* past + longest, padded */
    const real *gain;         /* [width of the last layer] */
} network;

/* Scratch is taken from one piece of memory; without `next`, `used` counts how much is needed. */
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

INLINE size_t state_numbers(const network *net) {
    size_t total = 0;
    for (int l = 0; l < net->layers; l++)
        total += (size_t)net->parts * net->rows[l] * net->width[l];
    return total;
}

INLINE int outputs(const network *net) { /* of all layers, for one token */
    int total = 0;
    for (int l = 0; l < net->layers; l++)
        total += net->width[l];
    return total;
}

/* A chunk's state and gradients: what is needed to write it and to differentiate through it. Below, n counts the tokens
   of a chunk, and m = past + n its writes. */
typedef struct {
    int parts;             /* of the state at its start that reads depend on: 1 where the momentum is zero */
    real *state[LAYERS];   /* at its start, [parts of the network * rows, width] */
    real *z[LAYERS];       /* outputs of the layers for the keys, [m, width] */
    real *error[LAYERS];   /* d_l, [m, width] */
    real *upstream[LAYERS];  /* d_{l+1} W_{l+1}, before the slope at z_l, [m, rows of layer l + 1] */
    real *scale;           /* [m]: factor that reduces the norm of a write's gradient to `clip`; at most 1 */
    real *norm;            /* [m]: that norm, before the factor */
} chunk;

/* Work on one chunk at a time. */
typedef struct {
    real *keys, *values, *queries;                   /* [m, rows[0]], [m, last width], [n, rows[0]] */
    real *theta, *alpha, *grad_theta, *grad_alpha, *grad_eta; /* [n] */
    real *delta, *gamma, *grad_delta, *grad_gamma;            /* [m] */
    decay decay;
    real *step;            /* [m]: 2 theta_s, or 2 gamma_s with a window, times the factor of clipping */
    real *last;            /* [m]: coefficient of d_s a_s^T in the weights after the last token, subtracted */
    real *last_momentum;   /* [m]: the same in the momentum after the last token */
    real *read;            /* [n, ld]: coefficient of d_s a_s^T in the weights that are read at token t, subtracted */
    real *carry;           /* [n]: coefficient of the weights at the chunk's start in the weights that are read at t */
    real *carry_momentum;  /* [n]: coefficient of the momentum at the chunk's start in them */
    real *input[LAYERS];   /* a_l, the input of layer l for the keys, [m, rows] */
    real *slope[LAYERS], *curvature[LAYERS]; /* first and second derivative of the activation at z_l, [m, width] */
    real *transposed[LAYERS];                          /* state transposed: [out, parts * rows] */
    real *anchor[LAYERS], *anchor_transposed[LAYERS];  /* of a chunk that began in an earlier call */
    real *query_z[LAYERS];                             /* outputs of the layers for the queries, [n, width] */
    real *gain;                                        /* of the LayerNorm, [width of the last layer], padded with 0 */
    real *x, *x_slope, *weighted, *weighted_momentum, *carried, *scores, *weighted_scores, *columns; /* temporaries */
    /* backward: grad_x is the gradient of x, and g that of a layer's output */
    real *grad_state[LAYERS], *grad_transposed[LAYERS], *grad_anchor[LAYERS], *grad_last_anchor[LAYERS];
    real *grad_input[LAYERS], *grad_error[LAYERS];
    real *grad_read, *grad_scores, *grad_carry, *grad_carry_momentum, *grad_last, *grad_last_momentum;
    decay_grad decay_grad;
    real *g, *back, *grad_values, *grad_queries, *grad_gain, *grad_step;
} work;

/* -- gates ---------------------------------------------------------------------------------------------------------- */

static void chunk_decay(const network *net, work *w, int n) {
    decay *decay = &w->decay;
    decay->n = n;
    decay->ld = net->ld;
    decay->momentum = net->parts == 2;
    decay->past = net->past;
    decay->theta = w->theta;
    for (int t = 0; t < n; t++)
        decay->retain[t] = 1 - w->alpha[t];
    decay_matrices(decay);
}

/* The decay matrices times the steps, once it is known how much the gradient of each write is clipped. */
static void find_coefficients(const network *net, work *w, const chunk *c, int n) {
    const decay *decay = &w->decay;
    int ld = net->ld, delay = net->read == BEFORE;
    const real *size = net->past ? w->gamma : w->theta;
    memset(w->step, 0, ld * sizeof(real));
    for (int s = 0; s < n + net->past; s++)
        w->step[s] = 2 * size[s] * c->scale[s];
    for (int t = 0; t < n; t++) {
        int from = t - delay; /* a read before the token is written sees what its predecessor left */
        w->carry[t] = from < 0 ? 1 : decay->A[from];
        w->carry_momentum[t] = from < 0 ? 0 : decay->m[from];
        for (int s = 0; s < ld; s += WIDTH)
            store_vec(w->read + t * ld + s,
                      from < 0 ? (vec){} : load_vec(decay->C + from * ld + s) * load_vec(w->step + s));
    }
    for (int s = 0; s < ld; s += WIDTH) {
        store_vec(w->last + s, load_vec(decay->C + (n - 1) * ld + s) * load_vec(w->step + s));
        store_vec(w->last_momentum + s, load_vec(decay->H + (n - 1) * ld + s) * load_vec(w->step + s));
    }
}

/* From the gradients of those matrices to the gates', and through the clipping to the errors' and inputs'. */
static void coefficients_backward(const network *net, work *w, const chunk *c, int n) {
    decay *decay = &w->decay;
    decay_grad *g = &w->decay_grad;
    int ld = net->ld, delay = net->read == BEFORE;
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
            store_vec(w->grad_step + s, load_vec(w->grad_step + s) + load_vec(from + s) * load_vec(C + s));
            store_vec(to + s, load_vec(from + s) * load_vec(w->step + s));
        }
    }
    int end = n - 1;
    g->A[end] += w->grad_carry[n]; /* of the state at the start in the state at the end */
    g->m[end] += w->grad_carry_momentum[n];
    for (int s = 0; s < ld; s += WIDTH) {
        vec step = load_vec(w->step + s), last = load_vec(w->grad_last + s),
            momentum = load_vec(w->grad_last_momentum + s);
        vec C = load_vec(decay->C + end * ld + s), H = load_vec(decay->H + end * ld + s);
        store_vec(w->grad_step + s, load_vec(w->grad_step + s) + last * C + momentum * H);
        store_vec(g->C + end * ld + s, load_vec(g->C + end * ld + s) + last * step);
        store_vec(g->H + s, momentum * step);
    }
    decay_backward(decay, g, w->grad_alpha, w->grad_eta, w->grad_theta);
    const real *size = net->past ? w->gamma : w->theta;
    real *grad_size = net->past ? w->grad_gamma : w->grad_theta;
    for (int s = 0; s < n + net->past; s++)
        grad_size[s] = 2 * c->scale[s] * w->grad_step[s];
    if (net->clip == 0)
        return;
    for (int s = 0; s < n + net->past; s++) {
        if (!(c->scale[s] < 1))
            continue;
        /* d scale / d norm = -scale / norm, and norm^2 is 4 sum |d|^2 |a|^2 */
        real grad_norm = -4 * 2 * size[s] * w->grad_step[s] * c->scale[s];
        for (int l = 0; l < net->layers; l++) {
            const real *a = w->input[l] + s * net->rows[l], *d = c->error[l] + s * net->width[l];
            real *grad_a = w->grad_input[l] + s * net->rows[l], *grad_d = w->grad_error[l] + s * net->width[l];
            real of_a = (real)(length(net->rows[l], a) / c->norm[s]);
            real of_d = (real)(length(net->width[l], d) / c->norm[s]);
            /* in this order, because the square of a quotient may underflow */
            for (int i = 0; i < net->rows[l]; i += WIDTH)
                store_vec(grad_a + i, load_vec(grad_a + i) + load_vec(a + i) * of_d * (of_d * grad_norm));
            for (int i = 0; i < net->width[l]; i += WIDTH)
                store_vec(grad_d + i, load_vec(grad_d + i) + load_vec(d + i) * of_a * (of_a * grad_norm));
        }
    }
}

INLINE objective objective_of(const network *net, const work *w, int t) { /* of token t */
    objective found = net->objective;
    found.delta = w->delta[t];
    return found;
}

/* -- gradients ---------------------------------------------------------------------------------------------------------- */

/* The inputs of layer l + 1 and the derivatives of the activation, from the outputs z of layer l. Gated: the slope of
   both factors, and the curvature of the first and what an error of one adds to the other. */
static void activate_layer(const network *net, int l, int n, const real *z, real *a, real *slope, real *curvature) {
    int half = net->rows[l + 1], width = net->width[l];
    if (!net->gated) {
        activate_each(net->activation, n * width, z, a, slope, curvature);
        return;
    }
    for (int t = 0; t < n; t++, z += width, a += half) {
        real *s = slope ? slope + (size_t)t * width : NULL, *c = curvature ? curvature + (size_t)t * width : NULL;
        activate_each(net->activation, half, z, a, s, c);
        for (int i = 0; i < half; i += WIDTH) {
            vec value = load_vec(a + i), gate = load_vec(z + half + i);
            store_vec(a + i, value * gate);
            if (c) {
                store_vec(c + i, load_vec(c + i) * gate);
                store_vec(c + half + i, load_vec(s + i));
            }
            if (s) {
                store_vec(s + i, load_vec(s + i) * gate);
                store_vec(s + half + i, value);
            }
        }
    }
}

/* Back through the activation after layer l, from g [n, rows of layer l + 1] to [n, width], plus `more` unless null; may
   write over g. */
INLINE void through_slope(const network *net, int l, int n, const real *g, const real *slope, const real *more,
                          real *to) {
    int half = net->rows[l + 1], width = net->width[l];
    if (!net->gated) {
        for (int i = 0; i < n * width; i += WIDTH)
            store_vec(to + i, load_vec(g + i) * load_vec(slope + i) + (more ? load_vec(more + i) : (vec){}));
        return;
    }
    for (int t = n - 1; t >= 0; t--) /* the last first, because a row of the result is wider */
        for (int i = 0; i < half; i += WIDTH) {
            vec gi = load_vec(g + (size_t)t * half + i);
            size_t at = (size_t)t * width + i;
            store_vec(to + at, gi * load_vec(slope + at) + (more ? load_vec(more + at) : (vec){}));
            at += half;
            store_vec(to + at, gi * load_vec(slope + at) + (more ? load_vec(more + at) : (vec){}));
        }
}

/* The weights that a chunk's gradients are taken at: [in, out], and [out, in] with rows of `ld` numbers. */
typedef struct {
    real *const *weights, *const *transposed;
    int ld[LAYERS];
} anchor;

/* Keys forward through the anchor and half errors back: fills the chunk (its state apart) and the inputs and slopes.
   The first layer's transposed weights are not needed. */
static void differentiate(const network *net, work *w, chunk *c, int n, const anchor *anchor) {
    int top = net->layers - 1;
    n += net->past;
    w->input[0] = w->keys;
    for (int l = 0; l <= top; l++) {
        int width = net->width[l];
        multiply(n, width, net->in[l], w->input[l], net->rows[l], anchor->weights[l], width, c->z[l], width, SET);
        if (l < top)
            activate_layer(net, l, n, c->z[l], w->input[l + 1], w->slope[l], NULL);
    }
    int width = net->width[top];
    for (int t = 0; t < n; t++) {
        real *d = c->error[top] + t * width;
        const real *z = c->z[top] + t * width, *v = w->values + t * width;
        objective objective = objective_of(net, w, t);
        if (net->normed)
            norm_error(&objective, net->out[top], w->keys + t * width, v, net->gain, z, w->x, d);
        else
            half_error(&objective, width, z, v, d);
    }
    for (int l = top - 1; l >= 0; l--) {
        int rows = net->rows[l + 1];
        multiply(n, rows, net->out[l + 1], c->error[l + 1], net->width[l + 1], anchor->transposed[l + 1],
                 anchor->ld[l + 1], c->upstream[l], rows, SET);
        through_slope(net, l, n, c->upstream[l], w->slope[l], NULL, c->error[l]);
    }
    for (int t = 0; t < n; t++) {
        c->scale[t] = 1;
        if (net->clip == 0)
            continue;
        real square = 0;
        for (int l = 0; l <= top; l++) {
            vec aa = {}, dd = {};
            for (int i = 0; i < net->rows[l]; i += WIDTH)
                aa += load_vec(w->input[l] + t * net->rows[l] + i) * load_vec(w->input[l] + t * net->rows[l] + i);
            for (int i = 0; i < net->width[l]; i += WIDTH)
                dd += load_vec(c->error[l] + t * net->width[l] + i) * load_vec(c->error[l] + t * net->width[l] + i);
            square += sum(aa) * sum(dd);
        }
        real norm = 2 * (real)sqrt((double)square);
        if (isinf(norm)) { /* squares overflow where the norm does not */
            double total = 0;
            for (int l = 0; l <= top; l++)
                total = hypot(total, length(net->rows[l], w->input[l] + t * net->rows[l]) *
                                         length(net->width[l], c->error[l] + t * net->width[l]));
            norm = 2 * (real)total;
        }
        c->norm[t] = norm;
        if (norm > net->clip)
            c->scale[t] = net->clip / norm + 0 * norm; /* NaN where the norm overflows */
    }
}

/* The errors times their coefficients in the weights (and momentum) at the end: [m, width] each. */
static void weighted_errors(const network *net, work *w, const chunk *c, int m, int l) {
    int width = net->width[l];
    for (int s = 0; s < m; s++)
        for (int i = 0; i < width; i += WIDTH) {
            vec d = load_vec(c->error[l] + s * width + i);
            store_vec(w->weighted + s * width + i, d * w->last[s]);
            if (net->parts == 2)
                store_vec(w->weighted_momentum + s * width + i, d * w->last_momentum[s]);
        }
}

/* The state after the chunk, in `to`, which may be where the state before it is. */
static void write_chunk(const network *net, work *w, const chunk *c, int n, real *const *to) {
    real A = w->decay.A[n - 1], E = w->decay.E[n - 1], m = w->decay.m[n - 1];
    int writes = n + net->past;
    for (int l = 0; l < net->layers; l++) {
        int width = net->width[l], size = net->rows[l] * width;
        const real *from = c->state[l];
        if (net->parts == 2)
            for (int i = 0; i < size; i += WIDTH) {
                vec weight = load_vec(from + i), momentum = load_vec(from + size + i);
                store_vec(to[l] + i, weight * A + momentum * m);
                store_vec(to[l] + size + i, momentum * E);
            }
        else
            for (int i = 0; i < size; i += WIDTH)
                store_vec(to[l] + i, load_vec(from + i) * A);
        weighted_errors(net, w, c, writes, l);
        multiply_transposed(net->in[l], width, writes, w->input[l], net->rows[l], w->weighted, width, to[l], width,
                            SUBTRACT);
        if (net->parts == 2)
            multiply_transposed(net->in[l], width, writes, w->input[l], net->rows[l], w->weighted_momentum, width,
                                to[l] + size, width, SUBTRACT);
    }
}

/* -- read ----------------------------------------------------------------------------------------------------------- */

/* [A x | m x]: the coefficients of the state at the start, multiplied into the layer's input */
static void carry(const network *net, const work *w, int parts, int n, int l, const real *x, real *carried) {
    int rows = net->rows[l];
    for (int t = 0; t < n; t++) {
        real *to = carried + (size_t)t * parts * rows;
        for (int i = 0; i < rows; i += WIDTH) {
            vec xi = load_vec(x + t * rows + i);
            store_vec(to + i, xi * w->carry[t]);
            if (parts == 2)
                store_vec(to + rows + i, xi * w->carry_momentum[t]);
        }
    }
}

/* The writes of a chunk of n that the block of tokens from t on reads: its own and earlier ones */
INLINE int seen_by(const network *net, int t, int n) { return net->past ? n + net->past : min(t + BLOCK, n); }

/* All queries, each at the weights that it reads: the layers' outputs in `query_z`. */
static void read_chunk(const network *net, work *w, const chunk *c, int n, const anchor *anchor,
                       real *const *query_z) {
    int ld = net->ld;
    const real *x = w->queries;
    for (int l = 0; l < net->layers; l++) {
        int rows = net->rows[l], width = net->width[l], stacked = c->parts * rows;
        if (l) {
            activate_layer(net, l - 1, n, query_z[l - 1], w->x, NULL, NULL);
            x = w->x;
        }
        if (net->read == ANCHOR) {
            multiply(n, width, net->in[l], x, rows, anchor->weights[l], width, query_z[l], width, SET);
            continue;
        }
        carry(net, w, c->parts, n, l, x, w->carried);
        multiply(n, width, stacked, w->carried, stacked, c->state[l], width, query_z[l], width, SET);
        transpose(n + net->past, net->in[l], w->input[l], rows, w->columns, ld);
        for (int t = 0; t < n; t += BLOCK) { /* causal: a block of tokens reads what it and earlier blocks wrote */
            int count = min(n - t, BLOCK), seen = seen_by(net, t, n);
            real *scores = w->scores + t * ld;
            const real *weights = w->read + t * ld;
            multiply(count, padded(seen), net->in[l], x + t * rows, rows, w->columns, ld, scores, ld, SET);
            for (int r = 0; r < count; r++)
                for (int s = 0; s < padded(seen); s += WIDTH)
                    store_vec(scores + r * ld + s, load_vec(scores + r * ld + s) * load_vec(weights + r * ld + s));
            multiply(count, width, seen, scores, ld, c->error[l], width, query_z[l] + t * width, width, SUBTRACT);
        }
    }
}

/* y, [n, last width], from the last layer's output; may write over it */
static void read_output(const network *net, work *w, int n, const real *z, real *y) {
    int top = net->layers - 1, width = net->width[top];
    for (int t = 0; t < n; t++, z += width, y += width)
        if (net->normed)
            norm_read(net->out[top], w->queries + t * width, net->gain, z, w->x, y);
        else
            memmove(y, z, width * sizeof(real));
}

/* -- backward ------------------------------------------------------------------------------------------------------- */

/* Through `write_chunk`. `grad_state` is of the state at the end and becomes that of the state at the start; sets the
   gradients of inputs and errors, and of the tokens' coefficients at the end. */
static void write_chunk_backward(const network *net, work *w, const chunk *c, int n) {
    real A = w->decay.A[n - 1], E = w->decay.E[n - 1], m = w->decay.m[n - 1];
    double grad_A = 0, grad_m = 0, grad_E = 0;
    n += net->past;
    memset(w->grad_last, 0, net->ld * sizeof(real));
    memset(w->grad_last_momentum, 0, net->ld * sizeof(real));
    for (int l = 0; l < net->layers; l++) {
        int rows = net->rows[l], width = net->width[l], size = rows * width, two = net->parts == 2;
        real *grad = w->grad_state[l], *grad_weighted = w->g, *grad_weighted_momentum = w->back;
        const real *from = c->state[l];
        multiply(n, width, net->in[l], w->input[l], rows, grad, width, grad_weighted, width,
                 SET);
        if (two)
            multiply(n, width, net->in[l], w->input[l], rows, grad + size, width, grad_weighted_momentum, width, SET);
        for (int s = 0; s < n; s++) {
            vec along = {}, along_momentum = {};
            real last = w->last[s], last_momentum = w->last_momentum[s];
            for (int i = s * width; i < (s + 1) * width; i += WIDTH) {
                vec d = load_vec(c->error[l] + i), f = load_vec(grad_weighted + i), grad_d = f * -last;
                along += d * f;
                store_vec(w->weighted + i, d * last);
                if (two) {
                    vec fm = load_vec(grad_weighted_momentum + i);
                    along_momentum += d * fm;
                    grad_d -= fm * last_momentum;
                    store_vec(w->weighted_momentum + i, d * last_momentum);
                }
                store_vec(w->grad_error[l] + i, grad_d);
            }
            w->grad_last[s] -= sum(along);
            w->grad_last_momentum[s] -= sum(along_momentum);
        }
        int ldr = net->parts * rows;
        transpose(net->parts * rows, net->out[l], grad, width, w->grad_transposed[l], ldr);
        memset(w->grad_input[l], 0, (size_t)n * rows * sizeof(real));
        multiply(n, rows, net->out[l], w->weighted, width, w->grad_transposed[l], ldr, w->grad_input[l], rows, SUBTRACT);
        if (two)
            multiply(n, rows, net->out[l], w->weighted_momentum, width, w->grad_transposed[l] + rows, ldr,
                     w->grad_input[l], rows, SUBTRACT);
        for (int row = 0; row < size; row += width) { /* sums that cancel: short ones, added up in double */
            vec sum_A = {}, sum_m = {}, sum_E = {};
            for (int i = row; i < row + width; i += WIDTH) {
                vec g = load_vec(grad + i);
                sum_A += g * load_vec(from + i);
                if (two) {
                    vec gm = load_vec(grad + size + i), momentum = load_vec(from + size + i);
                    sum_m += g * momentum;
                    sum_E += gm * momentum;
                    store_vec(grad + size + i, g * m + gm * E);
                }
                store_vec(grad + i, g * A);
            }
            grad_A += sum(sum_A);
            grad_m += sum(sum_m);
            grad_E += sum(sum_E);
        }
    }
    n -= net->past;
    w->grad_carry[n] = (real)grad_A;
    w->grad_carry_momentum[n] = (real)grad_m;
    w->decay_grad.E = (real)grad_E;
}

/* The same where the state at the end has no gradient. */
static void unread_chunk_backward(const network *net, work *w, int n) {
    for (int l = 0; l < net->layers; l++) {
        memset(w->grad_error[l], 0, (size_t)(n + net->past) * net->width[l] * sizeof(real));
        memset(w->grad_input[l], 0, (size_t)(n + net->past) * net->rows[l] * sizeof(real));
    }
    memset(w->grad_last, 0, net->ld * sizeof(real));
    memset(w->grad_last_momentum, 0, net->ld * sizeof(real));
    w->grad_carry[n] = w->grad_carry_momentum[n] = w->decay_grad.E = 0;
}

/* Through `read_chunk` and `read_output`, from the gradient of y in `g`; adds to the gradients of state, anchor, inputs
   and errors, sets those of the queries and of the reads' coefficients. */
static void read_chunk_backward(const network *net, work *w, const chunk *c, int n, const anchor *anchor,
                                real *const *grad_anchor, real *const *query_z) {
    int ld = net->ld, top = net->layers - 1;
    real *g = w->g;
    memset(w->grad_read, 0, (size_t)n * ld * sizeof(real));
    memset(w->grad_carry, 0, n * sizeof(real));
    memset(w->grad_carry_momentum, 0, n * sizeof(real));
    if (net->normed) {
        int width = net->width[top];
        memcpy(w->grad_queries, g, (size_t)n * width * sizeof(real));
        for (int i = 0; i < n * width; i += width)
            norm_read_backward(net->out[top], net->gain, query_z[top] + i, w->x, g + i, w->grad_gain);
    } else
        memset(w->grad_queries, 0, (size_t)n * net->rows[0] * sizeof(real));
    for (int l = top; l >= 0; l--) {
        int rows = net->rows[l], width = net->width[l], stacked = c->parts * rows;
        const real *x = w->queries;
        if (l) {
            activate_layer(net, l - 1, n, query_z[l - 1], w->x, w->x_slope, NULL);
            x = w->x;
        }
        real *grad_x = l ? w->g : w->grad_queries; /* from the state's share on, g is not needed */
        if (net->read == ANCHOR) {
            multiply_transposed(net->in[l], width, n, x, rows, g, width, grad_anchor[l], width, ADD);
            real *back = w->carried;
            multiply(n, rows, net->out[l], g, width, anchor->transposed[l], anchor->ld[l], back, rows, SET);
            if (l)
                through_slope(net, l - 1, n, back, w->x_slope, NULL, g);
            else
                for (int i = 0; i < n * rows; i += WIDTH)
                    store_vec(grad_x + i, load_vec(grad_x + i) + load_vec(back + i));
            continue;
        }
        /* the state's share */
        carry(net, w, c->parts, n, l, x, w->carried);
        multiply_transposed(stacked, width, n, w->carried, stacked, g, width, w->grad_state[l], width, ADD);
        real *back = w->carried;
        multiply(n, stacked, net->out[l], g, width, w->transposed[l], stacked, back, stacked, SET);
        /* the share of the chunk's own tokens */
        int writes = n + net->past;
        transpose(writes, net->in[l], w->input[l], rows, w->columns, ld);
        for (int t = 0; t < n; t += BLOCK)
            multiply(min(n - t, BLOCK), padded(seen_by(net, t, n)), net->in[l], x + t * rows, rows, w->columns, ld,
                     w->scores + t * ld, ld, SET);
        transpose(writes, net->out[l], c->error[l], width, w->columns, ld);
        for (int t = 0; t < n; t += BLOCK) {
            int count = min(n - t, BLOCK), seen = seen_by(net, t, n);
            multiply(count, padded(seen), net->out[l], g + t * width, width, w->columns, ld, w->grad_scores + t * ld, ld,
                     SET);
            for (int r = t; r < t + count; r++)
                for (int s = r * ld; s < r * ld + padded(seen); s += WIDTH) {
                    vec score = load_vec(w->scores + s), grad = load_vec(w->grad_scores + s),
                        read = load_vec(w->read + s);
                    store_vec(w->grad_read + s, load_vec(w->grad_read + s) - grad * score);
                    store_vec(w->weighted_scores + s, score * read);
                    store_vec(w->grad_scores + s, grad * read); /* negated where it is used */
                }
        }
        for (int s = 0; s < writes; s += BLOCK) { /* a block was read by itself and later blocks, from t on */
            int count = min(writes - s, BLOCK), t = net->past ? 0 : s;
            multiply_transposed(count, width, n - t, w->weighted_scores + t * ld + s, ld, g + t * width, width,
                                w->grad_error[l] + s * width, width, SUBTRACT);
            multiply_transposed(count, rows, n - t, w->grad_scores + t * ld + s, ld, x + t * rows, rows,
                                w->grad_input[l] + s * rows, rows, SUBTRACT);
        }
        for (int t = 0; t < n; t++) {
            vec along = {}, along_momentum = {};
            const real *from = back + (size_t)t * stacked;
            for (int i = 0; i < rows; i += WIDTH) {
                vec xi = load_vec(x + t * rows + i), b = load_vec(from + i), total = b * w->carry[t];
                along += xi * b;
                if (c->parts == 2) {
                    vec bm = load_vec(from + rows + i);
                    along_momentum += xi * bm;
                    total += bm * w->carry_momentum[t];
                }
                store_vec(grad_x + t * rows + i, l ? total : load_vec(grad_x + t * rows + i) + total);
            }
            w->grad_carry[t] += sum(along);
            w->grad_carry_momentum[t] += sum(along_momentum);
        }
        for (int t = 0; t < n; t += BLOCK)
            multiply(min(n - t, BLOCK), rows, seen_by(net, t, n), w->grad_scores + t * ld, ld, w->input[l], rows,
                     grad_x + t * rows, rows, SUBTRACT);
        if (l)
            through_slope(net, l - 1, n, g, w->x_slope, NULL, g);
    }
}

/* From the gradient of the error of layer l, in grad_error, to that of what came back to its activation, in its place
   [n, rows of layer l + 1], and to the part of the gradient of z_l that the slope has, in `curvature`. */
static void through_curvature(const network *net, const work *w, const chunk *c, int n, int l) {
    int half = net->rows[l + 1], width = net->width[l];
    real *g = w->grad_error[l], *curvature = w->curvature[l];
    const real *slope = w->slope[l], *upstream = c->upstream[l];
    if (!net->gated) {
        for (int i = 0; i < n * width; i += WIDTH) {
            vec gi = load_vec(g + i);
            store_vec(curvature + i, gi * load_vec(upstream + i) * load_vec(curvature + i));
            store_vec(g + i, gi * load_vec(slope + i));
        }
        return;
    }
    for (int t = 0; t < n; t++)
        for (int i = 0; i < half; i += WIDTH) {
            size_t first = (size_t)t * width + i, second = first + half, one = (size_t)t * half + i;
            vec g1 = load_vec(g + first), g2 = load_vec(g + second), back = load_vec(upstream + one);
            vec own = load_vec(curvature + first), across = load_vec(curvature + second);
            store_vec(curvature + first, back * (g1 * own + g2 * across));
            store_vec(curvature + second, back * g1 * across);
            store_vec(g + one, g1 * load_vec(slope + first) + g2 * load_vec(slope + second));
        }
}

/* Through `differentiate`, once the gradients of inputs and errors are complete: second order. Adds to `grad_anchor`
   [in, out]; sets the gradients of keys (grad_input[0]) and values. */
static void differentiate_backward(const network *net, work *w, const chunk *c, int n, const anchor *anchor,
                                   real *const *grad_anchor) {
    int top = net->layers - 1;
    n += net->past;
    /* errors ran down the layers, so their gradient runs up ... */
    for (int l = 0; l < top; l++) {
        int rows = net->rows[l + 1], wider = net->width[l + 1];
        real *g = w->grad_error[l];
        through_curvature(net, w, c, n, l);
        multiply(n, wider, net->in[l + 1], g, rows, anchor->weights[l + 1], wider, w->grad_error[l + 1], wider, ADD);
        multiply_transposed(net->in[l + 1], wider, n, g, rows, c->error[l + 1], wider, grad_anchor[l + 1], wider, ADD);
    }
    /* ... and then the inputs' gradient runs down */
    int width = net->width[top];
    real *g = w->g;
    for (int t = 0; t < n; t++) {
        int i = t * width;
        const real *grad = w->grad_error[top] + i;
        objective objective = objective_of(net, w, t);
        if (net->normed)
            w->grad_delta[t] = norm_error_backward(
                &objective, net->out[top], w->keys + i, w->values + i, net->gain, c->z[top] + i, c->error[top] + i,
                grad, g + i, w->grad_input[0] + i, w->grad_values + i, w->grad_gain, w->x);
        else
            w->grad_delta[t] = half_error_backward(&objective, width, c->z[top] + i, w->values + i, grad, g + i,
                                                   w->grad_values + i);
    }
    for (int l = top; l >= 0; l--) {
        int rows = net->rows[l], width = net->width[l];
        multiply_transposed(net->in[l], width, n, w->input[l], rows, g, width, grad_anchor[l], width, ADD);
        multiply(n, rows, net->out[l], g, width, anchor->transposed[l], anchor->ld[l], w->grad_input[l], rows, ADD);
        if (l)
            through_slope(net, l - 1, n, w->grad_input[l], w->slope[l - 1], w->curvature[l - 1], g);
    }
}
