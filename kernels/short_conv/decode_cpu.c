/* A memory's inputs from one token: projections, convolution, SiLU, unit length, and the gates. */

#include "cpu_runtime/activation.h"
#include "cpu_runtime/matvec.h"
#include "cpu_runtime/thread_pool.h"

#include <stdlib.h>

struct call {
    int64_t threads, batch, in, heads, dim, taps, gates, parts; /* parts: q, k, v, or q alone */
    int64_t hard;                                               /* the gates' sigmoids: lines cut off at 0 and 1 */
    const real *x;                                              /* [batch, in] */
    const real *history;                                        /* [batch, taps - 1, ...]; q's channels first */
    int64_t history_batch, history_token;
    real *new_history;                                          /* [batch, taps - 1, parts heads dim], or null */
    const real *weight, *controls, *bias;                       /* [parts heads dim, in], [gates, in], [gates] */
    const real *taps_of;                                        /* [parts heads dim, taps]; null: no convolution */
    real *y;                                                    /* [parts, batch, heads, dim] */
    real *gate;                                                 /* [gates / heads, batch, heads]; null: not wanted */
    double max_step, eps; /* bound of the first gate; in the length of q and k */
};

static void finish(const struct call *c, int64_t row, int64_t part, int64_t head, const real *projected) {
    int dim = (int)c->dim, taps = (int)c->taps;
    int64_t channels = c->parts * c->heads * dim, first = (part * c->heads + head) * dim;
    real *y = c->y + ((part * c->batch + row) * c->heads + head) * dim;
    const real *own = projected + row * channels + first;
    if (c->taps_of) {
        const real *history = c->history + row * c->history_batch + first;
        for (int i = 0; i < dim; i++) {
            const real *tap = c->taps_of + (first + i) * taps;
            real total = own[i] * tap[taps - 1];
            for (int t = 0; t < taps - 1; t++)
                total += history[t * c->history_token + i] * tap[t];
            y[i] = total;
        }
        if (c->new_history)
            for (int t = 0; t < taps - 1; t++)
                memcpy(c->new_history + (row * (taps - 1) + t) * channels + first,
                       t < taps - 2 ? history + (t + 1) * c->history_token : own, dim * sizeof(real));
    } else
        memcpy(y, own, dim * sizeof(real));
    vec squares = {};
    for (int i = 0; i < dim; i += WIDTH) {
        vec z = load_partial(y + i, dim - i);
        z *= logistic(z);
        squares += z * z;
        store_partial(y + i, z, dim - i);
    }
    if (part == 2)
        return;
    vec inverse = all((real)(1 / sqrt((double)sum(squares) + c->eps)));
    for (int i = 0; i < dim; i += WIDTH)
        store_partial(y + i, load_partial(y + i, dim - i) * inverse, dim - i);
}

/* (z + 3) / 6 within 0 and 1, both of which are exact */
static vec hard_logistic(vec z) {
    z += 3;
    z = pick(z < 0, (vec){}, z);
    return pick(z > 6, all(6), z) / 6;
}

struct scratch {
    const struct call *call;
    real *projected; /* [batch, parts heads dim] */
};

static void project_band(const void *context, int64_t band, int worker) {
    (void)worker;
    const struct scratch *s = context;
    const struct call *c = s->call;
    int64_t channels = c->parts * c->heads * c->dim;
    for (int64_t o = band * BAND; o < channels && o < (band + 1) * BAND; o += WIDTH)
        for (int64_t row = 0; row < c->batch; row++)
            apply(WIDTH, (int)c->in, c->weight + o * c->in, c->in, c->x + row * c->in,
                  s->projected + row * channels + o);
}

int memory_inputs(const struct call *c) {
    int64_t channels = c->parts * c->heads * c->dim;
    real *projected = aligned_alloc(64, (c->batch * channels * sizeof(real) + 63) / 64 * 64);
    if (!projected)
        return 1;
    struct scratch s = {c, projected};
    share_out(c->threads, bands_of(channels), project_band, &s);
    for (int64_t i = 0; i < c->batch * c->parts * c->heads; i++)
        finish(c, i / (c->parts * c->heads), i / c->heads % c->parts, i % c->heads, projected);
    if (c->gate)
        for (int64_t row = 0; row < c->batch; row++)
            for (int64_t o = 0; o < c->gates; o += WIDTH) {
                int some = (int)(c->gates - o < WIDTH ? c->gates - o : WIDTH);
                real raw[WIDTH];
                apply(some, (int)c->in, c->controls + o * c->in, c->in, c->x + row * c->in, raw);
                vec z = load_vec(raw) + (c->bias ? load_partial(c->bias + o, some) : (vec){});
                vec open = c->hard ? hard_logistic(z) : logistic(z);
                for (int i = 0; i < some; i++) {
                    int64_t kind = (o + i) / c->heads, head = (o + i) % c->heads;
                    c->gate[(kind * c->batch + row) * c->heads + head] = open[i] * (kind ? 1 : (real)c->max_step);
                }
            }
    free(projected);
    return 0;
}
