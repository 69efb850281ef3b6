/* The gradients of a chunk's writes at its anchor, as inputs and errors of the layers, and their derivatives. */

#pragma once

#include "chunk.h"

INLINE objective objective_of(const network *net, const work *w, int t) { /* of token t */
    objective found = net->objective;
    found.delta = w->delta[t];
    return found;
}

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
