/* LayerNorm without a bias, one row at a time, and the derivatives of it that a memory under LayerNorm needs.

   J = (I - 1 1^T / d - n n^T / d) / sigma is its Jacobian at z, with n = (z - mean) / sigma; it is symmetric.
   Rows are padded with zeros. */

#pragma once

#include "objective.h"

#define EPS ((real)1e-6)

/* n of z, which may be in its place; returns 1 / sigma */
INLINE real layer_norm(int width, const real *z, real *n) {
    int end = padded(width), last = end - WIDTH;
    vec valid = inside(width), total = {}, square = {};
    for (int i = 0; i < end; i += WIDTH)
        total += load_vec(z + i);
    real mean = sum(total) / width;
    for (int i = 0; i < end; i += WIDTH) {
        vec x = load_vec(z + i) - mean;
        if (i == last)
            x *= valid;
        square += x * x;
        store_vec(n + i, x);
    }
    real inverse = 1 / (real)sqrt((double)(sum(square) / width + EPS));
    for (int i = 0; i < end; i += WIDTH)
        store_vec(n + i, load_vec(n + i) * inverse);
    return inverse;
}

/* J g; may write over g */
INLINE void layer_norm_vjp(int width, const real *g, const real *n, real inverse, real *out) {
    int end = padded(width), last = end - WIDTH;
    vec valid = inside(width), total = {}, along = {};
    for (int i = 0; i < end; i += WIDTH) {
        total += load_vec(g + i);
        along += load_vec(g + i) * load_vec(n + i);
    }
    real mean = sum(total) / width, share = sum(along) / width;
    for (int i = 0; i < end; i += WIDTH) {
        vec x = (load_vec(g + i) - mean - load_vec(n + i) * share) * inverse;
        store_vec(out + i, i == last ? x * valid : x);
    }
}

/* y = x + n gain from the network's output z; y may be in its place */
INLINE void norm_read(int width, const real *x, const real *gain, const real *z, real *n, real *y) {
    layer_norm(width, z, n);
    for (int i = 0; i < padded(width); i += WIDTH)
        store_vec(y + i, load_vec(x + i) + load_vec(n + i) * load_vec(gain + i));
}

/* From the gradient g of that y to that of z, in its place; adds to grad_gain. */
INLINE void norm_read_backward(int width, const real *gain, const real *z, real *n, real *g, real *grad_gain) {
    real inverse = layer_norm(width, z, n);
    for (int i = 0; i < padded(width); i += WIDTH) {
        store_vec(grad_gain + i, load_vec(grad_gain + i) + load_vec(g + i) * load_vec(n + i));
        store_vec(g + i, load_vec(g + i) * load_vec(gain + i));
    }
    layer_norm_vjp(width, g, n, inverse, g);
}

/* The error of the prediction k + n(z) gain, back to z: J (e gain), e the half error of `objective`. */
INLINE void norm_error(const objective *objective, int width, const real *k, const real *v, const real *gain,
                       const real *z, real *n, real *error) {
    int end = padded(width);
    real inverse = layer_norm(width, z, n);
    for (int i = 0; i < end; i += WIDTH)
        store_vec(error + i, load_vec(k + i) + load_vec(n + i) * load_vec(gain + i));
    half_error(objective, end, error, v, error);
    for (int i = 0; i < end; i += WIDTH)
        store_vec(error + i, load_vec(error + i) * load_vec(gain + i));
    layer_norm_vjp(width, error, n, inverse, error);
}

enum { NORM_ROWS = 6 /* of work for norm_error_backward */ };

/* From the gradient g of that error to those of z (in grad_z), k and v; grad_k and grad_gain are added to. Returns that
   of the objective's delta. */
INLINE real norm_error_backward(const objective *objective, int width, const real *k, const real *v, const real *gain,
                                const real *z, const real *error, const real *g, real *grad_z, real *grad_k,
                                real *grad_v, real *grad_gain, real *work) {
    int end = padded(width);
    real *n = work, *u = work + end, *grad_u = work + 2 * end, *p = work + 3 * end, *prediction = work + 4 * end,
         *grad_prediction = work + 5 * end;
    real inverse = layer_norm(width, z, n);
    layer_norm_vjp(width, g, n, inverse, grad_u);
    for (int i = 0; i < end; i += WIDTH) {
        store_vec(prediction + i, load_vec(k + i) + load_vec(n + i) * load_vec(gain + i));
        store_vec(grad_prediction + i, load_vec(grad_u + i) * load_vec(gain + i));
    }
    half_error(objective, end, prediction, v, u);
    real grad_delta = half_error_backward(objective, end, prediction, v, grad_prediction, grad_prediction, grad_v);
    vec u_n = {}, p_n = {}, p_error = {};
    for (int i = 0; i < end; i += WIDTH) {
        vec ni = load_vec(n + i), gi = load_vec(gain + i), e = load_vec(u + i), ui = e * gi;
        vec grad = load_vec(grad_prediction + i), pi = load_vec(g + i) * inverse;
        store_vec(u + i, ui);
        store_vec(p + i, pi);
        store_vec(grad_k + i, load_vec(grad_k + i) + grad);
        store_vec(grad_gain + i, load_vec(grad_gain + i) + load_vec(grad_u + i) * e + grad * ni);
        store_vec(grad_z + i, grad * gi);
        u_n += ui * ni;
        p_n += pi * ni;
        p_error += pi * load_vec(error + i);
    }
    /* the error depends on z through the inner n, through the n of its own projection, and through 1 / sigma */
    real mean_u = sum(u_n) / width, mean_p = sum(p_n) / width, sigma = sum(p_error) / width;
    for (int i = 0; i < end; i += WIDTH)
        store_vec(grad_z + i, load_vec(grad_z + i) - load_vec(p + i) * mean_u - load_vec(u + i) * mean_p);
    layer_norm_vjp(width, grad_z, n, inverse, grad_z);
    for (int i = 0; i < end; i += WIDTH)
        store_vec(grad_z + i, load_vec(grad_z + i) - load_vec(n + i) * sigma);
    return grad_delta;
}
