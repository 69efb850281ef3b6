/* y = norm(a) f(norm(b)): the normalizations and gates around attention and memory, one pass over memory each way.

   A token is `heads` vectors of `dim` numbers side by side, and the next token lies a step further. Each vector is
   normalized on its own, x / sqrt(|x|^2 / divisor + eps), and scaled by the gain of its head. Backward computes it all
   again from a and b: reading them is all it takes, and nothing else was kept. */

#include "cpu_runtime/rows.h"
#include <stdlib.h>

/* norm(a); norm(a) sigmoid(norm(b)); norm(a) silu(b); a silu(b) */
enum kind { NORM, GATE, GATED_NORM, SILU_GATE };

/* results lie densely where no step is given; a null pointer: there is none, or it is not wanted */
struct call {
    int64_t kind, threads, tokens, heads, dim;
    const real *a, *b;
    int64_t a_step, b_step;
    const real *gain_a, *gain_b; /* [heads, dim] */
    real *y;
    const real *grad;
    int64_t grad_step;
    real *grad_a, *grad_b;
    int64_t grad_a_step, grad_b_step;
    real *grad_gain_a, *grad_gain_b;
    double divisor, eps;
};

INLINE vec scale(const real *gain, int64_t i, int64_t n) { return gain ? load_partial(gain + i, n) : all(1); }

/* 1 / sqrt(|x|^2 / divisor + eps) */
INLINE real inverse(const struct call *c, const real *x) {
    vec squares = {};
    for (int64_t i = 0; i < c->dim; i += WIDTH) {
        vec v = load_partial(x + i, c->dim - i);
        squares += v * v;
    }
    return (real)(1 / sqrt((double)sum(squares) / c->divisor + c->eps));
}

INLINE void forward(enum kind kind, const struct call *c, int64_t token, int64_t head) {
    int64_t at = head * c->dim;
    const real *a = c->a + token * c->a_step + at, *b = c->b + token * c->b_step + at;
    const real *gain_a = c->gain_a ? c->gain_a + at : NULL;
    real *y = c->y + token * c->heads * c->dim + at;
    vec of_a = kind != SILU_GATE ? all(inverse(c, a)) : all(1);
    vec of_b = kind == GATE ? all(inverse(c, b)) : all(1);
    for (int64_t i = 0; i < c->dim; i += WIDTH) {
        int64_t n = c->dim - i;
        vec out = load_partial(a + i, n);
        if (kind != SILU_GATE)
            out *= of_a * scale(gain_a, i, n);
        if (kind != NORM) {
            vec z = load_partial(b + i, n);
            if (kind == GATE)
                out *= logistic(z * of_b * load_partial(c->gain_b + at + i, n));
            else
                out *= z * logistic(z);
        }
        store_partial(y + i, out, n);
    }
}

/* of y = x r, r = 1 / sqrt(|x|^2 / divisor + eps): dx = r (dy - y <dy, y> / divisor); dx holds dy before */
INLINE void through_norm(const struct call *c, const real *x, real r, vec products, real *dx) {
    vec along = all((real)((double)sum(products) * r / c->divisor * r));
    for (int64_t i = 0; i < c->dim; i += WIDTH) {
        int64_t n = c->dim - i;
        store_partial(dx + i, (load_partial(dx + i, n) - load_partial(x + i, n) * along) * r, n);
    }
}

INLINE void add_to(real *p, vec x, int64_t n) { store_partial(p, load_partial(p, n) + x, n); }

/* sum_a, sum_b: where a part collects the gains' gradients */
INLINE void backward(enum kind kind, const struct call *c, int64_t token, int64_t head, real *sum_a, real *sum_b) {
    int64_t at = head * c->dim;
    const real *a = c->a + token * c->a_step + at, *b = c->b + token * c->b_step + at;
    const real *grad = c->grad + token * c->grad_step + at, *gain_a = c->gain_a ? c->gain_a + at : NULL;
    real *grad_a = c->grad_a + token * c->grad_a_step + at, *grad_b = c->grad_b + token * c->grad_b_step + at;
    real r_a = kind != SILU_GATE ? inverse(c, a) : 1, r_b = kind == GATE ? inverse(c, b) : 1;
    vec products_a = {}, products_b = {};
    for (int64_t i = 0; i < c->dim; i += WIDTH) {
        int64_t n = c->dim - i;
        vec x = load_partial(a + i, n), g = load_partial(grad + i, n), normed = x * r_a, left = normed;
        vec gain = kind != SILU_GATE ? scale(gain_a, i, n) : all(1);
        left *= gain;
        if (kind != NORM) {
            vec z = load_partial(b + i, n), raw = z, value, slope, gain_z = all(1);
            if (kind == GATE) {
                gain_z = load_partial(c->gain_b + at + i, n);
                z *= r_b * gain_z;
            }
            vec s = logistic(z);
            value = kind == GATE ? s : z * s;
            slope = kind == GATE ? s * (1 - s) : s + value * (1 - s);
            vec into_z = g * left * slope;
            g *= value;
            if (kind == GATE) {
                if (sum_b)
                    add_to(sum_b + at + i, into_z * raw * r_b, n);
                into_z *= gain_z;
                products_b += into_z * raw;
            }
            store_partial(grad_b + i, into_z, n);
        }
        if (kind != SILU_GATE) {
            if (sum_a)
                add_to(sum_a + at + i, g * normed, n);
            g *= gain;
            products_a += g * x;
        }
        store_partial(grad_a + i, g, n);
    }
    if (kind != SILU_GATE)
        through_norm(c, a, r_a, products_a, grad_a);
    if (kind == GATE)
        through_norm(c, b, r_b, products_b, grad_b);
}

INLINE void forward_as(enum kind kind, const struct call *c, int64_t start, int64_t stop) {
    for (int64_t token = start; token < stop; token++)
        for (int64_t head = 0; head < c->heads; head++)
            forward(kind, c, token, head);
}

INLINE void backward_as(enum kind kind, const struct call *c, int64_t start, int64_t stop, real *sum_a, real *sum_b) {
    for (int64_t token = start; token < stop; token++)
        for (int64_t head = 0; head < c->heads; head++)
            backward(kind, c, token, head, sum_a, sum_b);
}

#define EACH_KIND(call, kind, ...)                                                                                     \
    switch (kind) {                                                                                                    \
    case NORM:                                                                                                         \
        call(NORM, __VA_ARGS__);                                                                                       \
        break;                                                                                                         \
    case GATE:                                                                                                         \
        call(GATE, __VA_ARGS__);                                                                                       \
        break;                                                                                                         \
    case GATED_NORM:                                                                                                   \
        call(GATED_NORM, __VA_ARGS__);                                                                                 \
        break;                                                                                                         \
    case SILU_GATE:                                                                                                    \
        call(SILU_GATE, __VA_ARGS__);                                                                                  \
        break;                                                                                                         \
    }

int gated_forward(const struct call *c) {
    int64_t parts = parts_of(c->tokens * c->heads * c->dim);
#pragma omp parallel for num_threads(c->threads) schedule(static) if (parts > 1 && c->threads > 1)
    for (int64_t part = 0; part < parts; part++)
        EACH_KIND(forward_as, c->kind, c, c->tokens * part / parts, c->tokens * (part + 1) / parts)
    return 0;
}

/* 0, or 1 where there was no memory for the sums */
int gated_backward(const struct call *c) {
    int64_t gains = c->heads * c->dim, parts = parts_of(c->tokens * gains);
    int kinds = (c->grad_gain_a != NULL) + (c->grad_gain_b != NULL);
    real *sums = kinds ? calloc((size_t)(parts * gains * kinds), sizeof(real)) : NULL;
    if (kinds && !sums)
        return 1;
    real *sums_a = c->grad_gain_a ? sums : NULL;
    real *sums_b = c->grad_gain_b ? sums + (kinds - 1) * parts * gains : NULL;
#pragma omp parallel for num_threads(c->threads) schedule(static) if (parts > 1 && c->threads > 1)
    for (int64_t part = 0; part < parts; part++) {
        real *sum_a = sums_a ? sums_a + part * gains : NULL, *sum_b = sums_b ? sums_b + part * gains : NULL;
        EACH_KIND(backward_as, c->kind, c, c->tokens * part / parts, c->tokens * (part + 1) / parts, sum_a, sum_b)
    }
    if (sums_a)
        add_parts(sums_a, parts, gains, c->grad_gain_a);
    if (sums_b)
        add_parts(sums_b, parts, gains, c->grad_gain_b);
    free(sums);
    return 0;
}
