/* What may stand between the layers of a memory network, with the derivatives that training through it needs. */

#pragma once

#include "vector.h"

enum activation { IDENTITY, RELU, SILU, GELU };

/* value, slope and curvature at z; what a caller does not use costs nothing */
INLINE void activate(enum activation kind, vec z, vec *value, vec *slope, vec *curvature) {
    if (kind == GELU) {
        vec e = exponential(z * z * (real)-0.5);
        vec below = normal(z, e), density = e * (real)0.39894228040143267794;
        *value = z * below;
        *slope = below + z * density;
        *curvature = density * (2 - z * z);
    } else if (kind == SILU) {
        vec s = logistic(z), d = s * (1 - s);
        *value = z * s;
        *slope = s + z * d;
        *curvature = d * (2 + z * (1 - 2 * s));
    } else if (kind == RELU) {
        *value = pick(z <= 0, (vec){}, z);
        *slope = pick(z > 0, all(1), (vec){});
        *curvature = (vec){};
    } else {
        *value = z;
        *slope = all(1);
        *curvature = (vec){};
    }
}

INLINE void activate_as(enum activation kind, int count, const real *z, real *value, real *slope, real *curvature) {
    for (int i = 0; i < count; i += WIDTH) {
        vec a, b, c;
        activate(kind, load_vec(z + i), &a, &b, &c);
        if (value)
            store_vec(value + i, a);
        if (slope)
            store_vec(slope + i, b);
        if (curvature)
            store_vec(curvature + i, c);
    }
}

/* count numbers, a multiple of a vector's; a null pointer: not wanted. May write over z. */
static __attribute__((noinline)) void activate_each(enum activation kind, int count, const real *z, real *value,
                                                    real *slope, real *curvature) {
    switch (kind) {
    case GELU:
        activate_as(GELU, count, z, value, slope, curvature);
        break;
    case SILU:
        activate_as(SILU, count, z, value, slope, curvature);
        break;
    case RELU:
        activate_as(RELU, count, z, value, slope, curvature);
        break;
    default:
        activate_as(IDENTITY, count, z, value, slope, curvature);
    }
}
