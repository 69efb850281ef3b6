/* From the projected inputs to queries, keys and values: causal depthwise convolution, SiLU, and unit length for the
   queries' and keys' heads, in one pass over memory each way. Backward computes all of it again from the inputs.

   A token's convolution takes `width` rows: its own and those before it, the first of which lie in the history. Where
   queries alone are computed (outputs 1), every token comes right after the history instead. */

#include "cpu_runtime/rows.h"
#include <omp.h>
#include <stdlib.h>

enum { TILE = 16, LONGEST = 64 }; /* tokens worked on at a time; taps of a convolution */

/* Inputs and histories have dense channels; q, k, v and their gradients, [batch, time, heads, dim], are dense, as are
   weight, [3 heads dim, width], and the next history. A null pointer: there is none, or it is not needed. Of queries
   alone, the inputs have a third of the channels, and gradients of weight and history are written in the first third. */
struct call {
    int64_t threads, batch, time, heads, dim, width, outputs; /* outputs: q, k, v, or q alone */
    const real *inputs, *history;
    int64_t inputs_batch, inputs_time, history_batch, history_time;
    const real *weight;      /* null: no convolution, width 1 */
    const int64_t *length;   /* of each batch row, after which its history ends; null: all of them are whole */
    real *qkv[3], *next;
    const real *grad_qkv[3], *grad_next;
    real *grad_inputs, *grad_history, *grad_weight;
    double eps;
};

INLINE int64_t channels_of(const struct call *c) { return c->outputs * c->heads * c->dim; }

/* row p of a batch row's history and inputs, one after the other */
INLINE const real *past(const struct call *c, int64_t row, int64_t p) {
    int64_t before = c->width - 1;
    return p < before ? c->history + row * c->history_batch + p * c->history_time
                      : c->inputs + row * c->inputs_batch + (p - before) * c->inputs_time;
}

/* the rows of a token's convolution */
INLINE void rows_of(int width, const struct call *c, int64_t row, int64_t token, const real **rows) {
    for (int i = 0; i < width; i++)
        rows[i] = past(c, row, c->outputs > 1 || i == width - 1 ? token + i : i);
}

/* weight [channels, width] -> [width, channels], in memory of its own */
static real *taps_of(const struct call *c) {
    int64_t channels = channels_of(c);
    real *taps = malloc((size_t)(channels * c->width) * sizeof(real));
    for (int64_t i = 0; taps && i < c->width; i++)
        for (int64_t channel = 0; channel < channels; channel++)
            taps[i * channels + channel] = c->weight ? c->weight[channel * c->width + i] : 1;
    return taps;
}

/* n numbers of the convolution, channels from `at` on */
INLINE vec convolved(int width, const real *const *rows, const real *taps, int64_t channels, int64_t at, int64_t n) {
    vec z = load_partial(rows[0] + at, n) * load_partial(taps + at, n);
    for (int i = 1; i < width; i++)
        z += load_partial(rows[i] + at, n) * load_partial(taps + i * channels + at, n);
    return z;
}

INLINE void forward(int width, const struct call *c, const real *taps, int64_t row, int64_t token) {
    int64_t dim = c->dim, channels = channels_of(c);
    const real *rows[LONGEST];
    rows_of(width, c, row, token, rows);
    for (int part = 0; part < c->outputs; part++)
        for (int64_t head = 0; head < c->heads; head++) {
            int64_t at = (part * c->heads + head) * dim;
            real *y = c->qkv[part] + ((row * c->time + token) * c->heads + head) * dim;
            vec squares = {};
            for (int64_t i = 0; i < dim; i += WIDTH) {
                vec z = convolved(width, rows, taps, channels, at + i, dim - i);
                vec u = z * logistic(z);
                squares += u * u;
                store_partial(y + i, u, dim - i);
            }
            if (part < 2) {
                vec r = all((real)(1 / sqrt((double)sum(squares) + c->eps)));
                for (int64_t i = 0; i < dim; i += WIDTH)
                    store_partial(y + i, load_partial(y + i, dim - i) * r, dim - i);
            }
        }
}

/* the gradient of the convolution's output at a token */
INLINE void through_heads(int width, const struct call *c, const real *taps, int64_t row, int64_t token, real *out) {
    int64_t dim = c->dim, channels = channels_of(c);
    const real *rows[LONGEST];
    rows_of(width, c, row, token, rows);
    real u_of[dim], slope_of[dim];
    for (int part = 0; part < c->outputs; part++)
        for (int64_t head = 0; head < c->heads; head++) {
            int64_t at = (part * c->heads + head) * dim;
            const real *grad = c->grad_qkv[part];
            if (!grad) {
                memset(out + at, 0, (size_t)dim * sizeof(real));
                continue;
            }
            grad += ((row * c->time + token) * c->heads + head) * dim;
            vec squares = {}, products = {};
            for (int64_t i = 0; i < dim; i += WIDTH) {
                int64_t n = dim - i;
                vec z = convolved(width, rows, taps, channels, at + i, n);
                vec s = logistic(z), u = z * s, slope = s + u * (1 - s), g = load_partial(grad + i, n);
                if (part < 2) {
                    squares += u * u;
                    products += u * g;
                    store_partial(u_of + i, u, n);
                    store_partial(slope_of + i, slope, n);
                } else
                    store_partial(out + at + i, g * slope, n);
            }
            if (part < 2) {
                double square = 1 / ((double)sum(squares) + c->eps);
                vec r = all((real)sqrt(square)), along = all((real)(sum(products) * square));
                for (int64_t i = 0; i < dim; i += WIDTH) {
                    int64_t n = dim - i;
                    vec g = load_partial(grad + i, n), u = load_partial(u_of + i, n);
                    store_partial(out + at + i, r * (g - u * along) * load_partial(slope_of + i, n), n);
                }
            }
        }
}

/* The convolution's transpose for the tokens of a tile, whose gradients and the width - 1 after them are the rows of
   `grads`; and what they add to the weight's gradient. A column of the tile at a time: taps stay in registers. */
INLINE void through_taps(int width, const struct call *c, const real *taps, const real *grads, int64_t row,
                         int64_t start, int64_t stop, real *grad_taps) {
    int64_t channels = channels_of(c), count = stop - start;
    const real *rows[TILE + LONGEST];
    for (int64_t i = 0; i < count + width - 1; i++)
        rows[i] = past(c, row, start + i);
    real *to = c->grad_inputs + (row * c->time + start) * channels;
    for (int64_t at = 0; at < channels; at += WIDTH) {
        int64_t n = channels - at;
        vec tap[LONGEST], of_tap[LONGEST];
        for (int i = 0; i < width; i++) {
            tap[i] = load_partial(taps + i * channels + at, n);
            of_tap[i] = (vec){};
        }
        for (int64_t t = 0; t < count; t++) {
            vec g = load_partial(grads + t * channels + at, n), into = g * tap[width - 1];
            for (int m = 1; m < width; m++)
                into += load_partial(grads + (t + m) * channels + at, n) * tap[width - 1 - m];
            store_partial(to + t * channels + at, into, n);
            if (grad_taps)
                for (int i = 0; i < width; i++)
                    of_tap[i] += g * load_partial(rows[t + i] + at, n);
        }
        if (grad_taps)
            for (int i = 0; i < width; i++) {
                real *p = grad_taps + i * channels + at;
                store_partial(p, load_partial(p, n) + of_tap[i], n);
            }
    }
}

/* The same for queries alone: the last tap is on the token itself, all others are on the history. `sums`: [2, channels],
   over tokens, of the gradients and of their products with the inputs; or null. */
static void through_last_tap(const struct call *c, const real *taps, const real *grad, int64_t row, int64_t token,
                             real *sums) {
    int64_t channels = channels_of(c);
    const real *x = past(c, row, token + c->width - 1), *own = taps + (c->width - 1) * channels;
    real *to = c->grad_inputs + (row * c->time + token) * channels;
    for (int64_t at = 0; at < channels; at += WIDTH) {
        int64_t n = channels - at;
        vec g = load_partial(grad + at, n);
        store_partial(to + at, g * load_partial(own + at, n), n);
        if (sums) {
            store_partial(sums + at, load_partial(sums + at, n) + g, n);
            store_partial(sums + channels + at, load_partial(sums + channels + at, n) + g * load_partial(x + at, n), n);
        }
    }
}

/* what these sums over a row's tokens add to the gradients of the history and the weight */
static void through_other_taps(const struct call *c, const real *taps, int64_t row, const real *sums) {
    int64_t channels = channels_of(c), before = c->width - 1;
    for (int64_t at = 0; at < channels; at++) {
        for (int64_t i = 0; i < before; i++) {
            c->grad_history[(row * before + i) * 3 * channels + at] = sums[at] * taps[i * channels + at];
            c->grad_weight[at * c->width + i] += sums[at] * past(c, row, i)[at];
        }
        c->grad_weight[at * c->width + before] += sums[channels + at];
    }
}

/* tokens before the first one: only the tokens after them use them */
static void through_history(const struct call *c, const real *taps, const real *grads, int64_t row) {
    int64_t channels = channels_of(c);
    real *to = c->grad_history + row * (c->width - 1) * channels;
    for (int64_t p = 0; p < c->width - 1; p++)
        for (int64_t at = 0; at < channels; at++) {
            real total = 0;
            for (int64_t i = 0; i <= p; i++)
                total += taps[i * channels + at] * grads[(p - i) * channels + at];
            to[p * channels + at] = total;
        }
}

/* `grads`: room for TILE + width - 1 rows */
INLINE void backward(int width, const struct call *c, const real *taps, int64_t row, int64_t start, int64_t stop,
                     real *grads, real *grad_taps) {
    int64_t channels = channels_of(c), after = width - 1;
    int64_t ready = start; /* tokens whose gradient stands in `grads` already */
    for (int64_t first = start; first == start || first < stop; first += TILE) {
        int64_t last = first + TILE < stop ? first + TILE : stop;
        if (first > start)
            memmove(grads, grads + TILE * channels, (size_t)(after * channels) * sizeof(real));
        for (; ready < last + after; ready++) {
            real *out = grads + (ready - first) * channels;
            if (ready < c->time)
                through_heads(width, c, taps, row, ready, out);
            else
                memset(out, 0, (size_t)channels * sizeof(real));
        }
        if (first == 0 && c->grad_history)
            through_history(c, taps, grads, row);
        through_taps(width, c, taps, grads, row, first, last, grad_taps);
    }
}

static void forward_part(const struct call *c, const real *taps, int64_t row, int64_t start, int64_t stop) {
    for (int64_t token = start; token < stop; token++)
        if (c->width == 4)
            forward(4, c, taps, row, token);
        else
            forward((int)c->width, c, taps, row, token);
}

/* batch rows are cut into this many stretches of time */
static int64_t stretches(const struct call *c) {
    int64_t parts = parts_of(c->batch * c->time * channels_of(c)), rows = c->batch;
    int64_t each = rows ? (parts + rows - 1) / rows : 1, most = c->time / (4 * c->width);
    return each < most ? each : most > 1 ? most : 1;
}

/* 0, or 1 where there was no memory for it */
int query_key_value_forward(const struct call *c) {
    int64_t each = stretches(c), parts = c->batch * each, before = c->width - 1, channels = channels_of(c);
    real *taps = taps_of(c);
    if (!taps)
        return 1;
#pragma omp parallel for num_threads(c->threads) schedule(static) if (parts > 1 && c->threads > 1)
    for (int64_t part = 0; part < parts; part++)
        forward_part(c, taps, part / each, c->time * (part % each) / each, c->time * (part % each + 1) / each);
    for (int64_t row = 0; c->next && row < c->batch; row++)
        for (int64_t i = 0; i < before; i++)
            memcpy(c->next + (row * before + i) * channels, past(c, row, (c->length ? c->length[row] : c->time) + i),
                   (size_t)channels * sizeof(real));
    free(taps);
    return 0;
}

static int query_backward(const struct call *c, const real *taps) {
    int64_t each = stretches(c), parts = c->batch * each, channels = channels_of(c);
    real *grads = malloc((size_t)(c->threads * channels) * sizeof(real));
    real *sums = c->weight ? calloc((size_t)((parts + 1) * 2 * channels), sizeof(real)) : NULL;
    int failed = !grads || (c->weight && !sums);
#pragma omp parallel for num_threads(c->threads) schedule(static) if (parts > 1 && c->threads > 1)
    for (int64_t part = 0; part < parts; part++) {
        int64_t row = part / each, start = c->time * (part % each) / each, stop = c->time * (part % each + 1) / each;
        for (int64_t token = start; !failed && token < stop; token++) {
            real *grad = grads + omp_get_thread_num() * channels;
            if (c->width == 4)
                through_heads(4, c, taps, row, token, grad);
            else
                through_heads((int)c->width, c, taps, row, token, grad);
            through_last_tap(c, taps, grad, row, token, sums ? sums + part * 2 * channels : NULL);
        }
    }
    for (int64_t row = 0; sums && !failed && row < c->batch; row++) {
        real *total = sums + parts * 2 * channels;
        add_parts(sums + row * each * 2 * channels, each, 2 * channels, total);
        through_other_taps(c, taps, row, total);
    }
    free(grads);
    free(sums);
    return failed;
}

/* of queries alone, gradients of the history and the weight are added to what is there */
int query_key_value_backward(const struct call *c) {
    int64_t each = stretches(c), parts = c->batch * each, before = c->width - 1, channels = channels_of(c);
    int64_t weights = c->width * channels;
    int failed = 0;
    real *taps = taps_of(c);
    if (taps && c->outputs == 1) {
        failed = query_backward(c, taps);
        free(taps);
        return failed;
    }
    real *sums = c->grad_weight ? calloc((size_t)((parts + 1) * weights), sizeof(real)) : NULL;
    if (!taps || (c->grad_weight && !sums)) {
        free(taps);
        free(sums);
        return 1;
    }
#pragma omp parallel for num_threads(c->threads) schedule(static) if (parts > 1 && c->threads > 1)
    for (int64_t part = 0; part < parts; part++) {
        int64_t row = part / each, start = c->time * (part % each) / each, stop = c->time * (part % each + 1) / each;
        real *grads = malloc((size_t)((TILE + before) * channels) * sizeof(real));
        real *sum = sums ? sums + part * weights : NULL;
        if (!grads) {
#pragma omp atomic write
            failed = 1;
        } else if (c->width == 4)
            backward(4, c, taps, row, start, stop, grads, sum);
        else
            backward((int)c->width, c, taps, row, start, stop, grads, sum);
        free(grads);
    }
    if (c->grad_next) /* the next history is a copy of the last of the past */
        for (int64_t row = 0; row < c->batch; row++)
            for (int64_t i = 0; i < before; i++) {
                int64_t p = (c->length ? c->length[row] : c->time) + i;
                const real *from = c->grad_next + (row * before + i) * channels;
                real *to = p >= before        ? c->grad_inputs + (row * c->time + p - before) * channels
                           : c->grad_history ? c->grad_history + (row * before + p) * channels
                                             : NULL;
                for (int64_t at = 0; to && at < channels; at++)
                    to[at] += from[at];
            }
    if (sums) {
        real *total = sums + parts * weights;
        add_parts(sums, parts, weights, total);
        for (int64_t i = 0; i < c->width; i++)
            for (int64_t channel = 0; channel < channels; channel++)
                c->grad_weight[channel * c->width + i] = total[i * channels + channel];
    }
    free(taps);
    free(sums);
    return failed;
}
