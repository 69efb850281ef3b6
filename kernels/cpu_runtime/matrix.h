/* Products of small matrices that lie in a cache, and transposition.

   Matrices are rows of numbers with a leading dimension; the right factor and the result have rows that are padded to
   whole vectors, the left factor is read number by number, so it may also stand transposed.

   A tile of ROWS x 2 vectors of the result stays in registers while the inner dimension runs: one load of a vector
   serves ROWS products, and there are enough independent sums to keep the multipliers busy. Where operands are narrowed
   (operands.h), a tile reads words, and both factors are packed into them on their way. */

#pragma once

#include "operands.h"

#if defined(__AVX512F__) || defined(__aarch64__)
enum { ROWS = 8 };
#else
enum { ROWS = 4 };
#endif
enum { INNER = 128 }; /* a panel of this many rows and two vectors stays in the first cache */

enum mode { SET, ADD, SUBTRACT };

INLINE void tile(int rows, int vectors, int inner, const real *a, ptrdiff_t row, ptrdiff_t column, const real *b,
                 ptrdiff_t ldb, real *c, ptrdiff_t ldc, enum mode mode) {
    vec total[ROWS][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            total[i][j] = (vec){};
    for (int p = 0; p < inner; p++) {
        vec right[2];
        for (int j = 0; j < vectors; j++)
            right[j] = load_vec(b + p * ldb + j * WIDTH);
        for (int i = 0; i < rows; i++) {
            vec left = all(a[i * row + p * column]);
            for (int j = 0; j < vectors; j++)
                total[i][j] = add_product(total[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) {
            real *out = c + i * ldc + j * WIDTH;
            if (mode == SET)
                store_vec(out, total[i][j]);
            else if (mode == ADD)
                store_vec(out, load_vec(out) + total[i][j]);
            else
                store_vec(out, load_vec(out) - total[i][j]);
        }
}

INLINE void strip(int vectors, int m, int inner, const real *a, ptrdiff_t row, ptrdiff_t column, const real *b,
                  ptrdiff_t ldb, real *c, ptrdiff_t ldc, enum mode mode) {
    int i = 0;
    for (; i + ROWS <= m; i += ROWS)
        tile(ROWS, vectors, inner, a + i * row, row, column, b, ldb, c + i * ldc, ldc, mode);
    for (; i + 2 <= m; i += 2)
        tile(2, vectors, inner, a + i * row, row, column, b, ldb, c + i * ldc, ldc, mode);
    if (i < m)
        tile(1, vectors, inner, a + i * row, row, column, b, ldb, c + i * ldc, ldc, mode);
}

/* one step of a transposition: a and b interleaved, number by number */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#if VECTOR_BYTES / (REAL / 8) == 16
#define LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VECTOR_BYTES / (REAL / 8) == 8
#define LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#elif VECTOR_BYTES / (REAL / 8) == 4
#define LOW(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define HIGH(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#else
#define LOW(a, b) SHUFFLE(a, b, 0, 2)
#define HIGH(a, b) SHUFFLE(a, b, 1, 3)
#endif
#endif

/* to [columns, ldt] = from [rows, ldf]; what `to` has beyond `rows`, up to whole vectors, becomes zero.
   Rows of `from` can be read up to whole vectors. */
static __attribute__((noinline)) void transpose(int rows, int columns, const real *from, ptrdiff_t ldf, real *to,
                                                ptrdiff_t ldt) {
    for (int i = 0; i < rows; i += WIDTH)
        for (int j = 0; j < columns; j += WIDTH) {
#ifdef LOW
            vec x[WIDTH], y[WIDTH];
            if (i + WIDTH <= rows)
                for (int r = 0; r < WIDTH; r++)
                    x[r] = load_vec(from + (i + r) * ldf + j);
            else
                for (int r = 0; r < WIDTH; r++)
                    x[r] = i + r < rows ? load_vec(from + (i + r) * ldf + j) : (vec){};
            for (int step = 1; step < WIDTH; step *= 2) {
                for (int r = 0; r < WIDTH / 2; r++) {
                    y[2 * r] = LOW(x[r], x[r + WIDTH / 2]);
                    y[2 * r + 1] = HIGH(x[r], x[r + WIDTH / 2]);
                }
                for (int r = 0; r < WIDTH; r++)
                    x[r] = y[r];
            }
            int count = min(columns - j, WIDTH);
            if (count == WIDTH)
                for (int r = 0; r < WIDTH; r++)
                    store_vec(to + (j + r) * ldt + i, x[r]);
            else
                for (int r = 0; r < count; r++)
                    store_vec(to + (j + r) * ldt + i, x[r]);
#else
            for (int c = j; c < min(j + WIDTH, columns); c++)
                for (int r = i; r < i + WIDTH; r++)
                    to[c * ldt + r] = r < rows ? from[r * ldf + c] : 0;
#endif
        }
}

/* -- factors as words: what a tile reads, zeros behind its ends ------------------------------------------------------ */

/* from [k, n], of the first `wide` columns: to [words(k), wide], rows `ldt` words apart */
INLINE void pack_rows(int k, int n, int wide, const real *from, ptrdiff_t ld, real *to, ptrdiff_t ldt) {
    for (int p = 0; p < k; p += PAIR, from += PAIR * ld, to += ldt)
        for (int j = 0; j < wide; j += WIDTH) {
            vec first = load_partial(from + j, max(n - j, 0));
#ifdef NARROW
            store_vec(to + j, pair_rows(first, p + 1 < k ? load_partial(from + ld + j, max(n - j, 0)) : (vec){}));
#else
            store_vec(to + j, first);
#endif
        }
}

/* from [m, k]: to [m, words(k)], rows `ldt` words apart, whole vectors of words */
INLINE void pack_columns(int m, int k, const real *from, ptrdiff_t ld, real *to, ptrdiff_t ldt) {
    for (int i = 0; i < m; i++, from += ld, to += ldt)
        for (int p = 0; p < k; p += PAIR * WIDTH) {
            vec first = load_partial(from + p, k - p);
#ifdef NARROW
            store_vec(to + p / PAIR, pair_columns(first, load_partial(from + p + WIDTH, max(k - p - WIDTH, 0))));
#else
            store_vec(to + p, first);
#endif
        }
}

/* the same, transposed: to [words(k), wide]; `room` for WIDTH rows of words(k), padded */
INLINE void pack_turned(int n, int k, int wide, const real *from, ptrdiff_t ld, real *to, ptrdiff_t ldt, real *room) {
    ptrdiff_t ldr = padded(words(k));
    for (int j = 0; j < wide; j += WIDTH) {
        int rows = max(min(n - j, WIDTH), 0);
        pack_columns(rows, k, from + j * ld, ld, room, ldr);
        transpose(rows, words(k), room, ldr, to + j, ldt);
    }
}

/* -- products -------------------------------------------------------------------------------------------------------- */

#ifdef NARROW
enum { TALL = 128 }; /* rows of the left factor that are packed together: a panel of the right one serves them all */

INLINE void product(int m, int n, int k, const real *a, ptrdiff_t row, ptrdiff_t column, const real *b, ptrdiff_t ldb,
                    real *c, ptrdiff_t ldc, enum mode mode) {
    real left[TALL * INNER] __attribute__((aligned(64))), right[INNER * 2 * WIDTH] __attribute__((aligned(64)));
    for (int p = 0; p < k || p == 0; p += PAIR * INNER) {
        int inner = min(k - p, PAIR * INNER), pairs = words(inner);
        for (int i = 0; i < m; i += TALL) {
            int rows = min(m - i, TALL);
            ptrdiff_t left_row = column == 1 ? padded(pairs) : 1, left_column = column == 1 ? 1 : padded(rows);
            if (column == 1)
                pack_columns(rows, inner, a + i * row + p, row, left, left_row);
            else
                pack_rows(inner, rows, padded(rows), a + i + p * column, column, left, left_column);
            for (int j = 0; j < n; j += 2 * WIDTH) {
                int wide = min(n - j, 2 * WIDTH);
                pack_rows(inner, wide, wide, b + p * ldb + j, ldb, right, 2 * WIDTH);
                real *to = c + i * ldc + j;
                if (wide > WIDTH)
                    strip(2, rows, pairs, left, left_row, left_column, right, 2 * WIDTH, to, ldc, mode);
                else
                    strip(1, rows, pairs, left, left_row, left_column, right, 2 * WIDTH, to, ldc, mode);
            }
        }
        if (mode == SET)
            mode = ADD;
    }
}
#else
INLINE void product(int m, int n, int k, const real *a, ptrdiff_t row, ptrdiff_t column, const real *b, ptrdiff_t ldb,
                    real *c, ptrdiff_t ldc, enum mode mode) {
    for (int p = 0; p < k || p == 0; p += INNER) {
        const real *left = a + p * column, *right = b + p * ldb;
        int inner = min(k - p, INNER), j = 0;
        for (; j + 2 * WIDTH <= n; j += 2 * WIDTH)
            strip(2, m, inner, left, row, column, right + j, ldb, c + j, ldc, mode);
        if (j < n)
            strip(1, m, inner, left, row, column, right + j, ldb, c + j, ldc, mode);
        if (mode == SET)
            mode = ADD;
    }
}
#endif

/* c [m, n] (=, +=, -=) a [m, k] b [k, n]; n counts padding */
static __attribute__((noinline)) void multiply(int m, int n, int k, const real *a, ptrdiff_t lda, const real *b,
                                               ptrdiff_t ldb, real *c, ptrdiff_t ldc, enum mode mode) {
    if (mode == SET)
        product(m, n, k, a, lda, 1, b, ldb, c, ldc, SET);
    else if (mode == ADD)
        product(m, n, k, a, lda, 1, b, ldb, c, ldc, ADD);
    else
        product(m, n, k, a, lda, 1, b, ldb, c, ldc, SUBTRACT);
}

/* the same with a transposed: a [k, m] */
static __attribute__((noinline)) void multiply_transposed(int m, int n, int k, const real *a, ptrdiff_t lda,
                                                          const real *b, ptrdiff_t ldb, real *c, ptrdiff_t ldc,
                                                          enum mode mode) {
    if (mode == SET)
        product(m, n, k, a, 1, lda, b, ldb, c, ldc, SET);
    else if (mode == ADD)
        product(m, n, k, a, 1, lda, b, ldb, c, ldc, ADD);
    else
        product(m, n, k, a, 1, lda, b, ldb, c, ldc, SUBTRACT);
}
