/* Rotary positions: pairs (x_i, x_{i + d/2}) turned by angles whose cosines and sines are given, or turned back. */

#include "cpu_runtime/rows.h"

/* x [batch, time, heads, d], its last dimension dense; tables [1 or batch, time, d], [cos cos] and [-sin sin], with
   one step from row to row and one from token to token; y as x, dense */
struct call {
    int64_t threads, batch, time, heads, d, back;
    const real *x;
    int64_t x_batch, x_time, x_head;
    const real *cos, *sin;
    int64_t table_batch, table_time;
    real *y;
};

/* What PyTorch's operators compute, to the last bit: forward the first product is rounded and the second one added to
   it as one operation, backward both are rounded. */

static __attribute__((noinline)) void scale(int64_t d, const real *x, const real *cos, real *y) {
    for (int64_t i = 0; i < d; i += WIDTH)
        put_some(y + i, get_some(x + i, d - i) * get_some(cos + i, d - i), d - i);
}

static __attribute__((noinline)) void add_across(int64_t n, const real *x, const real *sin, real *y) {
    for (int64_t i = 0; i < n; i += WIDTH)
        put_some(y + i, get_some(y + i, n - i) + get_some(x + i, n - i) * get_some(sin + i, n - i), n - i);
}

static void turn(int64_t d, const real *x, const real *cos, const real *sin, real *y) {
    int64_t half = d / 2;
    scale(d, x, cos, y);
    add_across(half, x + half, sin, y);
    add_across(half, x, sin + half, y + half);
}

static void turn_back(int64_t d, const real *x, const real *cos, const real *sin, real *y, real *room) {
    int64_t half = d / 2;
    scale(d, x, cos, y);
    scale(d, x, sin, room);
    for (int64_t i = 0; i < half; i += WIDTH) {
        int64_t n = half - i;
        put_some(y + i, get_some(y + i, n) + get_some(room + half + i, n), n);
        put_some(y + half + i, get_some(y + half + i, n) + get_some(room + i, n), n);
    }
}

int rotate(const struct call *c) {
    int64_t tokens = c->batch * c->time;
#pragma omp parallel for num_threads(c->threads) schedule(static) if (c->threads > 1 && tokens * c->heads * c->d > PART)
    for (int64_t token = 0; token < tokens; token++) {
        int64_t row = token / c->time, t = token % c->time;
        const real *x = c->x + row * c->x_batch + t * c->x_time;
        int64_t table = row * c->table_batch + t * c->table_time;
        real room[c->d];
        for (int64_t head = 0; head < c->heads; head++) {
            const real *from = x + head * c->x_head;
            real *y = c->y + (token * c->heads + head) * c->d;
            if (c->back)
                turn_back(c->d, from, c->cos + table, c->sin + table, y, room);
            else
                turn(c->d, from, c->cos + table, c->sin + table, y);
        }
    }
    return 0;
}
