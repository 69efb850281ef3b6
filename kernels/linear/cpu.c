/* Products of large matrices, which the first cache does not hold: c = a b, either factor as it lies or transposed.

   Blocks of both factors are packed as tiles read them: of b a slice of the inner dimension, whole, by all threads; of
   a some rows of that slice, by the thread that needs them. A panel of b stays in the first cache while those rows go
   past it. */

#include <stdlib.h>

#include "cpu_runtime/matrix.h"

enum { SLICE = 2 * INNER /* words of the inner dimension */, BLOCK = 128 /* rows of a */, PANEL = 2 * WIDTH };

/* m x k and k x n; of either factor one of the two steps, from row to row and from column to column, is 1 */
struct call {
    int64_t threads, m, n, k;
    const real *a;
    int64_t a_row, a_column;
    const real *b;
    int64_t b_row, b_column;
    const real *bias; /* [n], or null */
    real *c;          /* [m, n] */
};

static void pack_panel(const struct call *c, int k, const real *b, int64_t j, real *to) {
    int n = (int)(c->n - j < PANEL ? c->n - j : PANEL);
    if (c->b_column == 1)
        pack_rows(k, n, PANEL, b + j, c->b_row, to, PANEL);
    else {
        real room[WIDTH * SLICE] __attribute__((aligned(64)));
        pack_turned(n, k, PANEL, b + j * c->b_column, c->b_column, to, PANEL, room);
    }
}

/* `rows` rows of c, from their packed factor; `more`: what stands there already is added to */
static void multiply_packed(const struct call *c, int64_t first, int rows, int inner, const real *a, ptrdiff_t row,
                            ptrdiff_t column, const real *b, int more) {
    for (int64_t j = 0; j < c->n; j += PANEL, b += (ptrdiff_t)inner * PANEL) {
        real *to = c->c + first * c->n + j;
        int n = (int)(c->n - j);
        if (n >= PANEL || n == WIDTH) {
            if (n == WIDTH)
                strip(1, rows, inner, a, row, column, b, PANEL, to, c->n, more ? ADD : SET);
            else if (more)
                strip(2, rows, inner, a, row, column, b, PANEL, to, c->n, ADD);
            else
                strip(2, rows, inner, a, row, column, b, PANEL, to, c->n, SET);
            continue;
        }
        real edge[BLOCK * PANEL] __attribute__((aligned(64)));
        strip(2, rows, inner, a, row, column, b, PANEL, edge, PANEL, SET);
        for (int i = 0; i < rows; i++)
            for (int o = 0; o < n; o++)
                to[i * c->n + o] = edge[i * PANEL + o] + (more ? to[i * c->n + o] : 0);
    }
}

static void rows_of(const struct call *c, int64_t first, int rows, int64_t p, int k, const real *b, real *room) {
    const real *a = c->a + first * c->a_row + p * c->a_column;
    int across = c->a_column == 1, row = across ? padded(words(k)) : 1, column = across ? 1 : padded(rows);
    if (across)
        pack_columns(rows, k, a, c->a_row, room, row);
    else
        pack_rows(k, rows, column, a, c->a_column, room, column);
    if (p == 0 && c->bias)
        for (int i = 0; i < rows; i++)
            memcpy(c->c + (first + i) * c->n, c->bias, (size_t)c->n * sizeof(real));
    multiply_packed(c, first, rows, words(k), room, row, column, b, p || c->bias);
}

/* Whether this machine's products can take bfloat16 operands. */
int multiplies_bfloat16(void) { return CAN_NARROW; }

/* Returns 1 where there is no memory left. */
int matrix_product(const struct call *c) {
    int64_t panels = (c->n + PANEL - 1) / PANEL, blocks = (c->m + BLOCK - 1) / BLOCK;
    blocks = (blocks + c->threads - 1) / c->threads * c->threads; /* no thread waits for another's last one */
    int64_t tall = (c->m + blocks - 1) / blocks;
    tall = (tall + ROWS - 1) / ROWS * ROWS;
    blocks = (c->m + tall - 1) / tall;
    size_t slice = (size_t)(c->k < PAIR * SLICE ? words((int)c->k) : SLICE);
    real *b = aligned_alloc(64, panels * slice * PANEL * sizeof(real));
    if (!b)
        return 1;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        real room[BLOCK * SLICE] __attribute__((aligned(64)));
        for (int64_t p = 0; p < c->k; p += PAIR * SLICE) {
            int k = (int)(c->k - p < PAIR * SLICE ? c->k - p : PAIR * SLICE);
#pragma omp for
            for (int64_t panel = 0; panel < panels; panel++)
                pack_panel(c, k, c->b + p * c->b_row, panel * PANEL, b + panel * words(k) * PANEL);
#pragma omp for
            for (int64_t block = 0; block < blocks; block++)
                rows_of(c, block * tall, (int)(c->m - block * tall < tall ? c->m - block * tall : tall), p, k, b,
                        room);
        }
    }
    free(b);
    return 0;
}
