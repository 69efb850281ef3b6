/* Rows of any width, and how many parts a job of rows is cut into. */

#pragma once

#include "vector.h"

/* the first n numbers at p, zeros behind them */
INLINE vec load_partial(const real *p, int64_t n) {
    if (n >= WIDTH)
        return load_vec(p);
    vec x = {};
    memcpy(&x, p, (size_t)n * sizeof(real));
    return x;
}
INLINE void store_partial(real *p, vec x, int64_t n) {
    if (n >= WIDTH)
        store_vec(p, x);
    else
        memcpy(p, &x, (size_t)n * sizeof(real));
}

/* Sums over tokens are made of one sum per part. How many parts there are depends on the size of the job alone, so that
   the result does not depend on the number of threads. */
enum { PART = 1 << 15, PARTS = 128 };

INLINE int64_t parts_of(int64_t numbers) {
    int64_t parts = numbers / PART;
    return parts < 1 ? 1 : parts > PARTS ? PARTS : parts;
}

INLINE void add_parts(const real *each, int64_t parts, int64_t count, real *total) {
    for (int64_t i = 0; i < count; i++) {
        double s = 0;
        for (int64_t part = 0; part < parts; part++)
            s += each[part * count + i];
        total[i] = (real)s;
    }
}
