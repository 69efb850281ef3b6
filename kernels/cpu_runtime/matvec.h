/* Matrices times single vectors: as fast as the matrix can be read.

   A matrix is rows of any length, anywhere, `ld` numbers from one to the next: what states and parameters are. A vector
   is scratch, padded with zeros to whole registers, and so is every vector that is written here.

   A few rows go along together, one sum in a register for each; once there are as many sums as a register has numbers,
   they are added up together: a tree of shuffles that takes as many steps as one sum would, WIDTH times fewer each. */

#pragma once

#include "matrix.h"
#include "rows.h"

/* Rows of a matrix that go to one thread. */
enum { BAND = 4 * WIDTH };

INLINE int64_t bands_of(int64_t rows) { return (rows + BAND - 1) / BAND; }

enum { TOGETHER = WIDTH < 8 ? WIDTH : 8, LINE = 64 / sizeof(real), AHEAD = 2048 / sizeof(real) };

/* the sum of each of WIDTH registers, which are used up */
INLINE vec sums(vec *x) {
#ifdef LOW
#pragma GCC unroll 4
    for (int half = WIDTH / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            x[i] = LOW(x[i], x[i + half]) + HIGH(x[i], x[i + half]);
    return x[0];
#else
    vec total = {};
    for (int i = 0; i < WIDTH; i++)
        total[i] = sum(x[i]);
    return total;
#endif
}

/* the products of a row's numbers with x, to be added up; four sums, for an addition need not wait for the last */
INLINE vec products(int n, const real *row, const real *x) {
    vec a = {}, b = {}, c = {}, d = {};
    int i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) {
        a += load_vec(row + i) * load_vec(x + i);
        b += load_vec(row + i + WIDTH) * load_vec(x + i + WIDTH);
        c += load_vec(row + i + 2 * WIDTH) * load_vec(x + i + 2 * WIDTH);
        d += load_vec(row + i + 3 * WIDTH) * load_vec(x + i + 3 * WIDTH);
    }
    for (; i < n; i += WIDTH)
        a += load_partial(row + i, n - i) * load_vec(x + i);
    return (a + b) + (c + d);
}

/* y = w x: w [out, in] */
static __attribute__((noinline)) void apply(int out, int in, const real *w, ptrdiff_t ld, const real *x, real *y) {
    for (int o = 0; o < out; o += WIDTH) {
        vec total[WIDTH];
        int rows = min(WIDTH, out - o);
        for (int r = 0; r < rows; r++) {
            const real *row = w + (o + r) * ld;
            for (int i = 0; i < in; i += LINE)
                __builtin_prefetch(row + AHEAD + i);
            total[r] = products(in, row, x);
        }
        for (int r = rows; r < WIDTH; r++)
            total[r] = (vec){};
        store_vec(y + o, sums(total));
    }
}

/* y = w^T x, or that more: w [out, in], y [in] */
static __attribute__((noinline)) void apply_reversed(int out, int in, const real *w, ptrdiff_t ld, const real *x,
                                                     real *y, int more) {
    int i = 0;
    for (; i + TOGETHER * WIDTH <= in; i += TOGETHER * WIDTH) {
        vec total[TOGETHER] = {};
        for (int o = 0; o < out; o++)
#pragma GCC unroll 8
            for (int j = 0; j < TOGETHER; j++)
                total[j] += load_vec(w + o * ld + i + j * WIDTH) * x[o];
        for (int j = 0; j < TOGETHER; j++)
            store_vec(y + i + j * WIDTH, more ? load_vec(y + i + j * WIDTH) + total[j] : total[j]);
    }
    for (; i < in; i += WIDTH) {
        vec total[2] = {}; /* two sums: an addition need not wait for the last */
        for (int o = 0; o < out; o++)
            total[o % 2] += load_partial(w + o * ld + i, in - i) * x[o];
        total[0] += total[1];
        store_vec(y + i, more ? load_vec(y + i) + total[0] : total[0]);
    }
}

/* The root of the sum of squares, within the range of numbers wherever the result is. */
INLINE double length(int n, const real *x) {
    vec largest = {}, total = {};
    for (int i = 0; i < n; i += WIDTH) {
        vec size = absolute(load_vec(x + i));
        largest = pick(size > largest, size, largest);
    }
    real maximum = 0;
    for (int i = 0; i < WIDTH; i++)
        maximum = largest[i] > maximum ? largest[i] : maximum;
    if (maximum == 0) { /* or every number is NaN */
        for (int i = 0; i < n; i += WIDTH)
            total += load_vec(x + i);
        return sum(total);
    }
    for (int i = 0; i < n; i += WIDTH) {
        vec part = load_vec(x + i) / maximum;
        total += part * part;
    }
    return maximum * sqrt((double)sum(total));
}

/* n numbers into scratch, padded */
INLINE void take_vector(int n, const real *from, real *to) {
    store_vec(to + padded(n) - WIDTH, (vec){});
    memcpy(to, from, n * sizeof(real));
}
