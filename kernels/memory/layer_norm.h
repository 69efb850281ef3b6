/* LayerNorm without a bias, one row at a time, and the derivatives of it that a memory under LayerNorm needs.

   J = (I - 1 1^T / d - n n^T / d) / sigma is its Jacobian at z, with n = (z - mean) / sigma; it is symmetric.
   Rows are padded with zeros. */

#pragma once

#include "cpu_runtime/vector.h"

#define EPS ((real)1e-6)

/* n of z, which may be in its place; returns 1 / sigma */
INLINE real layer_norm(int width, const real *z, real *n) {
    int end = padded(width), last = end - WIDTH;
    vec valid = inside(width), total = {}, square = {};
    for (int i = 0; i < end; i += WIDTH)
        total += get(z + i);
    real mean = sum(total) / width;
    for (int i = 0; i < end; i += WIDTH) {
        vec x = get(z + i) - mean;
        if (i == last)
            x *= valid;
        square += x * x;
        put(n + i, x);
    }
    real inverse = 1 / (real)sqrt((double)(sum(square) / width + EPS));
    for (int i = 0; i < end; i += WIDTH)
        put(n + i, get(n + i) * inverse);
    return inverse;
}

/* J g; may write over g */
INLINE void layer_norm_vjp(int width, const real *g, const real *n, real inverse, real *out) {
    int end = padded(width), last = end - WIDTH;
    vec valid = inside(width), total = {}, along = {};
    for (int i = 0; i < end; i += WIDTH) {
        total += get(g + i);
        along += get(g + i) * get(n + i);
    }
    real mean = sum(total) / width, share = sum(along) / width;
    for (int i = 0; i < end; i += WIDTH) {
        vec x = (get(g + i) - mean - get(n + i) * share) * inverse;
        put(out + i, i == last ? x * valid : x);
    }
}

/* y = x + n gain from the network's output z; y may be in its place */
INLINE void norm_read(int width, const real *x, const real *gain, const real *z, real *n, real *y) {
    layer_norm(width, z, n);
    for (int i = 0; i < padded(width); i += WIDTH)
        put(y + i, get(x + i) + get(n + i) * get(gain + i));
}

/* From the gradient g of that y to that of z, in its place; adds to grad_gain. */
INLINE void norm_read_backward(int width, const real *gain, const real *z, real *n, real *g, real *grad_gain) {
    real inverse = layer_norm(width, z, n);
    for (int i = 0; i < padded(width); i += WIDTH) {
        put(grad_gain + i, get(grad_gain + i) + get(g + i) * get(n + i));
        put(g + i, get(g + i) * get(gain + i));
    }
    layer_norm_vjp(width, g, n, inverse, g);
}

/* The (half) error of k + n(z) gain against v, back to z: J ((k + n gain - v) gain). */
INLINE void norm_error(int width, const real *k, const real *v, const real *gain, const real *z, real *n, real *error) {
    real inverse = layer_norm(width, z, n);
    for (int i = 0; i < padded(width); i += WIDTH)
        put(error + i, (get(k + i) + get(n + i) * get(gain + i) - get(v + i)) * get(gain + i));
    layer_norm_vjp(width, error, n, inverse, error);
}

/* From the gradient g of that error to those of z (in grad_z), k and v; grad_k and grad_gain are added to.
   `work` holds four rows. */
INLINE void norm_error_backward(int width, const real *k, const real *v, const real *gain, const real *z,
                                const real *error, const real *g, real *grad_z, real *grad_k, real *grad_v,
                                real *grad_gain, real *work) {
    int end = padded(width);
    real *n = work, *u = work + end, *grad_u = work + 2 * end, *p = work + 3 * end;
    real inverse = layer_norm(width, z, n);
    layer_norm_vjp(width, g, n, inverse, grad_u);
    vec u_n = {}, p_n = {}, p_error = {};
    for (int i = 0; i < end; i += WIDTH) {
        vec ni = get(n + i), gi = get(gain + i), residual = get(k + i) + ni * gi - get(v + i);
        vec grad_residual = get(grad_u + i) * gi, pi = get(g + i) * inverse;
        put(u + i, residual * gi);
        put(p + i, pi);
        put(grad_k + i, get(grad_k + i) + grad_residual);
        put(grad_v + i, -grad_residual);
        put(grad_gain + i, get(grad_gain + i) + get(grad_u + i) * residual + grad_residual * ni);
        put(grad_z + i, grad_residual * gi);
        u_n += residual * gi * ni;
        p_n += pi * ni;
        p_error += pi * get(error + i);
    }
    /* the error depends on z through the inner n, through the n of its own projection, and through 1 / sigma */
    real mean_u = sum(u_n) / width, mean_p = sum(p_n) / width, sigma = sum(p_error) / width;
    for (int i = 0; i < end; i += WIDTH)
        put(grad_z + i, get(grad_z + i) - get(p + i) * mean_u - get(u + i) * mean_p);
    layer_norm_vjp(width, grad_z, n, inverse, grad_z);
    for (int i = 0; i < end; i += WIDTH)
        put(grad_z + i, get(grad_z + i) - get(n + i) * sigma);
}
