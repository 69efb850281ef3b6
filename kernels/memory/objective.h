/* The error of a token: half the derivative of its loss with respect to the prediction p, from p and the value v, one
   row at a time; r = p - v. Rows are padded with zeros, where the error is zero. */

#pragma once

#include "cpu_runtime/vector.h"

enum loss { L2, L2_HALF, DOT, LP, LP_SMOOTH, HUBER, HUBER_ELEMENTWISE };

typedef struct {
    enum loss loss;
    real p, delta, smooth;
} objective;

/* NaN stays NaN */
INLINE vec sign_of(vec r) { return pick(r > 0, all(1), pick(r < 0, all(-1), r)); }

INLINE vec hyperbolic_tangent(vec x) {
    vec e = exponential(absolute(x) * -2), t = (1 - e) / (1 + e);
    return pick(x != x, x, pick(x < 0, -t, t));
}

/* |r|^power; 0 at 0 unless the power is 0 */
INLINE vec magnitude(vec r, real power) {
    vec x = absolute(r);
    if (power == 0)
        return all(1);
    if (power == 1)
        return x;
    if (power == 2)
        return x * x;
    for (int i = 0; i < WIDTH; i++)
        x[i] = x[i] == 0 ? 0 : (real)pow(x[i], power);
    return x;
}

/* whether |r| is at most delta */
static int is_within(const objective *o, int width, const real *p, const real *v) {
    vec total = {};
    for (int i = 0; i < width; i += WIDTH) {
        vec r = load_vec(p + i) - load_vec(v + i);
        total += r * r;
    }
    return (real)sqrt((double)sum(total)) <= o->delta;
}

static __attribute__((noinline)) void other_half_error(const objective *o, int width, const real *p, const real *v,
                                                       real *error) {
    int within = o->loss == HUBER && is_within(o, width, p, v);
    for (int i = 0; i < width; i += WIDTH) {
        vec r = load_vec(p + i) - load_vec(v + i), e;
        switch (o->loss) {
        case L2_HALF:
            e = r * (real)0.5;
            break;
        case DOT:
            e = load_vec(v + i) * (real)-0.5;
            break;
        case LP:
            e = sign_of(r) * magnitude(r, o->p - 1) * (o->p / 2);
            break;
        case LP_SMOOTH:
            e = hyperbolic_tangent(r * o->smooth) * magnitude(r, o->p - 1) * (o->p / 2);
            break;
        case HUBER:
            e = within ? r : sign_of(r) * (o->delta / 2);
            break;
        case HUBER_ELEMENTWISE:
            e = pick(absolute(r) > o->delta, sign_of(r) * o->delta, r) * (real)0.5;
            break;
        default:
            e = r;
        }
        store_vec(error + i, e);
    }
}

/* may write over p; width is a multiple of a vector's */
INLINE void half_error(const objective *o, int width, const real *p, const real *v, real *error) {
    if (o->loss != L2)
        other_half_error(o, width, p, v, error);
    else
        for (int i = 0; i < width; i += WIDTH)
            store_vec(error + i, load_vec(p + i) - load_vec(v + i));
}

static __attribute__((noinline)) real other_half_error_backward(const objective *o, int width, const real *p,
                                                                const real *v, const real *g, real *grad_p,
                                                                real *grad_v) {
    int within = o->loss == HUBER && is_within(o, width, p, v);
    vec of_delta = {};
    for (int i = 0; i < width; i += WIDTH) {
        vec r = load_vec(p + i) - load_vec(v + i), gi = load_vec(g + i), t, slope;
        switch (o->loss) {
        case L2_HALF:
            slope = all((real)0.5);
            break;
        case DOT:
            slope = (vec){};
            break;
        case LP:
            slope = magnitude(r, o->p - 2) * (o->p * (o->p - 1) / 2);
            break;
        case LP_SMOOTH:
            t = hyperbolic_tangent(r * o->smooth);
            slope = (1 - t * t) * o->smooth * magnitude(r, o->p - 1);
            if (o->p != 1)
                slope += absolute(t) * magnitude(r, o->p - 2) * (o->p - 1);
            slope *= o->p / 2;
            break;
        case HUBER:
            slope = all(within);
            of_delta += within ? (vec){} : gi * sign_of(r);
            break;
        case HUBER_ELEMENTWISE:
            slope = pick(absolute(r) > o->delta, (vec){}, all((real)0.5));
            of_delta += pick(absolute(r) > o->delta, gi * sign_of(r), (vec){});
            break;
        default:
            slope = all(1);
        }
        vec grad = gi * slope;
        store_vec(grad_p + i, grad);
        store_vec(grad_v + i, o->loss == DOT ? gi * (real)-0.5 : -grad);
    }
    return sum(of_delta) / 2;
}

/* From the gradient g of that error to those of p, which may be in its place, and v. Returns that of delta. */
INLINE real half_error_backward(const objective *o, int width, const real *p, const real *v, const real *g,
                                real *grad_p, real *grad_v) {
    if (o->loss != L2)
        return other_half_error_backward(o, width, p, v, g, grad_p, grad_v);
    for (int i = 0; i < width; i += WIDTH) {
        vec grad = load_vec(g + i);
        store_vec(grad_p + i, grad);
        store_vec(grad_v + i, -grad);
    }
    return 0;
}
