/* From the projected inputs to queries of a memory that learns nothing meanwhile: what query_key_value.c makes of each
   token if it came right after the history. What the history adds to the convolution is the same for all of them. */

#include "cpu_runtime/rows.h"
#include <stdlib.h>

/* Inputs and history have their channels side by side; y and the gradients lie densely but for the history's, whose rows
   are `channels` numbers long, of which the first heads * dim are the queries', as they are of the weight's rows. */
struct call {
    int64_t threads, batch, time, heads, dim, width, channels;
    const real *inputs, *history;
    int64_t inputs_batch, inputs_time, history_batch, history_time;
    const real *weight; /* [channels, width]; null: no convolution, width 1 */
    real *y;            /* [batch, time, heads, dim] */
    const real *grad;
    real *grad_inputs, *grad_history, *grad_weight; /* the last two: null without a convolution */
    double eps;
};

struct taps {
    real *own;  /* [heads dim]: on the token itself */
    real *past; /* [batch, heads dim]: the history's part of the sum */
};

static int taps_of(const struct call *c, struct taps *taps) {
    int64_t width = c->width, numbers = c->heads * c->dim;
    taps->own = malloc((size_t)((c->batch + 1) * numbers) * sizeof(real));
    if (!taps->own)
        return 1;
    taps->past = taps->own + numbers;
    for (int64_t at = 0; at < numbers; at++)
        taps->own[at] = c->weight ? c->weight[at * width + width - 1] : 1;
    for (int64_t row = 0; row < c->batch; row++)
        for (int64_t at = 0; at < numbers; at++) {
            real total = 0;
            for (int64_t i = 0; i < width - 1; i++)
                total += c->history[row * c->history_batch + i * c->history_time + at] * c->weight[at * width + i];
            taps->past[row * numbers + at] = total;
        }
    return 0;
}

static void forward(const struct call *c, const struct taps *taps, int64_t row, int64_t token, int64_t head) {
    int64_t dim = c->dim, at = head * dim, numbers = c->heads * dim;
    const real *x = c->inputs + row * c->inputs_batch + token * c->inputs_time + at;
    const real *past = taps->past + row * numbers + at, *own = taps->own + at;
    real *y = c->y + (row * c->time + token) * numbers + at;
    vec squares = {};
    for (int64_t i = 0; i < dim; i += WIDTH) {
        int64_t n = dim - i;
        vec z = get_some(past + i, n) + get_some(x + i, n) * get_some(own + i, n), u = z * logistic(z);
        squares += u * u;
        put_some(y + i, u, n);
    }
    vec r = all((real)(1 / sqrt((double)sum(squares) + c->eps)));
    for (int64_t i = 0; i < dim; i += WIDTH)
        put_some(y + i, get_some(y + i, dim - i) * r, dim - i);
}

INLINE void add_to(real *p, vec x, int64_t n) { put_some(p, get_some(p, n) + x, n); }

/* sums: over tokens, of the gradients of the convolution's output and of their products with the inputs; or null */
static void backward(const struct call *c, const struct taps *taps, int64_t row, int64_t token, int64_t head, real *sums) {
    int64_t dim = c->dim, at = head * dim, numbers = c->heads * dim;
    const real *x = c->inputs + row * c->inputs_batch + token * c->inputs_time + at;
    const real *past = taps->past + row * numbers + at, *own = taps->own + at;
    const real *grad = c->grad + (row * c->time + token) * numbers + at;
    real *to = c->grad_inputs + (row * c->time + token) * numbers + at, u_of[dim], slope_of[dim];
    vec squares = {}, products = {};
    for (int64_t i = 0; i < dim; i += WIDTH) {
        int64_t n = dim - i;
        vec z = get_some(past + i, n) + get_some(x + i, n) * get_some(own + i, n);
        vec s = logistic(z), u = z * s;
        squares += u * u;
        products += u * get_some(grad + i, n);
        put_some(u_of + i, u, n);
        put_some(slope_of + i, s + u * (1 - s), n);
    }
    double square = 1 / ((double)sum(squares) + c->eps);
    vec r = all((real)sqrt(square)), along = all((real)(sum(products) * square));
    for (int64_t i = 0; i < dim; i += WIDTH) {
        int64_t n = dim - i;
        vec g = r * (get_some(grad + i, n) - get_some(u_of + i, n) * along) * get_some(slope_of + i, n);
        put_some(to + i, g * get_some(own + i, n), n);
        if (sums) {
            add_to(sums + at + i, g, n);
            add_to(sums + numbers + at + i, g * get_some(x + i, n), n);
        }
    }
}

/* of one batch row, from the sums over its tokens */
static void through_taps(const struct call *c, int64_t row, const real *sums) {
    int64_t width = c->width, numbers = c->heads * c->dim;
    for (int64_t at = 0; at < numbers; at++) {
        for (int64_t i = 0; i < width - 1; i++) {
            c->grad_history[(row * (width - 1) + i) * c->channels + at] = sums[at] * c->weight[at * width + i];
            c->grad_weight[at * width + i] +=
                sums[at] * c->history[row * c->history_batch + i * c->history_time + at];
        }
        c->grad_weight[at * width + width - 1] += sums[numbers + at];
    }
}

/* batch rows are cut into this many stretches of time */
static int64_t stretches(const struct call *c) {
    int64_t parts = parts_of(c->batch * c->time * c->heads * c->dim);
    return c->batch ? (parts + c->batch - 1) / c->batch : 1;
}

/* 0, or 1 where there was no memory for it */
int query_forward(const struct call *c) {
    int64_t each = stretches(c);
    struct taps taps;
    if (taps_of(c, &taps))
        return 1;
#pragma omp parallel for num_threads(c->threads) schedule(static) if (c->batch * each > 1 && c->threads > 1)
    for (int64_t part = 0; part < c->batch * each; part++)
        for (int64_t t = c->time * (part % each) / each; t < c->time * (part % each + 1) / each; t++)
            for (int64_t head = 0; head < c->heads; head++)
                forward(c, &taps, part / each, t, head);
    free(taps.own);
    return 0;
}

/* gradients of the history and the weight are added to */
int query_backward(const struct call *c) {
    int64_t each = stretches(c), numbers = 2 * c->heads * c->dim;
    struct taps taps;
    if (taps_of(c, &taps))
        return 1;
    real *sums = c->weight ? calloc((size_t)((c->batch * each + 1) * numbers), sizeof(real)) : NULL;
    if (c->weight && !sums) {
        free(taps.own);
        return 1;
    }
#pragma omp parallel for num_threads(c->threads) schedule(static) if (c->batch * each > 1 && c->threads > 1)
    for (int64_t part = 0; part < c->batch * each; part++)
        for (int64_t t = c->time * (part % each) / each; t < c->time * (part % each + 1) / each; t++)
            for (int64_t head = 0; head < c->heads; head++)
                backward(c, &taps, part / each, t, head, sums ? sums + part * numbers : NULL);
    for (int64_t row = 0; sums && row < c->batch; row++) {
        real *total = sums + c->batch * each * numbers;
        add_parts(sums + row * each * numbers, each, numbers, total);
        through_taps(c, row, total);
    }
    free(sums);
    free(taps.own);
    return 0;
}
