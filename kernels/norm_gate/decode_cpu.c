/* A gated hidden layer for a few tokens, y = down (silu(gate x) * inner): feed-forward networks, where inner is `up x`,
   and the output of a memory, where inner is its normalized answer. Each weight is read once for all tokens. */

#include "cpu_runtime/activation.h"
#include "cpu_runtime/matvec.h"
#include "cpu_runtime/thread_pool.h"

#include <stdlib.h>

struct call {
    int64_t threads, tokens, in, hidden, out, heads;
    const real *x, *answer;           /* [tokens, in]; where there is no `up`, [tokens, hidden] */
    const real *gate, *up, *down;     /* [hidden, in] twice, [out, hidden]; in and hidden are whole registers */
    const real *gain;                 /* of the answer: [hidden] */
    real *y;                          /* [tokens, out] */
    double eps;
};

/* inner = answer / rms(answer) gain, head by head */
static void normalize(const struct call *c, const real *answer, real *inner) {
    int dim = (int)(c->hidden / c->heads);
    for (int64_t at = 0; at < c->hidden; at += dim) {
        vec squares = {};
        for (int i = 0; i < dim; i += WIDTH) {
            vec part = load_partial(answer + at + i, dim - i);
            squares += part * part;
        }
        vec inverse = all((real)(1 / sqrt((double)sum(squares) / dim + c->eps)));
        for (int i = 0; i < dim; i += WIDTH)
            store_partial(inner + at + i,
                          load_partial(answer + at + i, dim - i) * inverse * load_partial(c->gain + at + i, dim - i),
                          dim - i);
    }
}

/* WIDTH elements of weight x, from element o on */
INLINE void some_of(const real *weight, int64_t o, int64_t in, const real *x, real *y) {
    apply(WIDTH, (int)in, weight + o * in, in, x, y + o);
}

struct scratch {
    const struct call *call;
    real *gate, *inner; /* [tokens, hidden] */
};

static void gate_and_up(const void *context, int64_t band, int worker) {
    (void)worker;
    const struct scratch *s = context;
    const struct call *c = s->call;
    for (int64_t o = band * BAND; o < c->hidden && o < (band + 1) * BAND; o += WIDTH)
        for (int64_t t = 0; t < c->tokens; t++) {
            const real *x = c->x + t * c->in;
            some_of(c->gate, o, c->in, x, s->gate + t * c->hidden);
            if (c->up)
                some_of(c->up, o, c->in, x, s->inner + t * c->hidden);
        }
}

static void multiply_gate(const struct scratch *s, int64_t t) {
    const struct call *c = s->call;
    real *to = s->inner + t * c->hidden;
    if (!c->up)
        normalize(c, c->answer + t * c->hidden, to);
    for (int64_t i = 0; i < c->hidden; i += WIDTH) {
        vec z = load_vec(s->gate + t * c->hidden + i);
        store_vec(to + i, load_vec(to + i) * z * logistic(z));
    }
}

static void project_down(const void *context, int64_t band, int worker) {
    (void)worker;
    const struct scratch *s = context;
    const struct call *c = s->call;
    for (int64_t o = band * BAND; o < c->out && o < (band + 1) * BAND; o += WIDTH) {
        int rows = (int)(c->out - o < WIDTH ? c->out - o : WIDTH);
        for (int64_t t = 0; t < c->tokens; t++) {
            real some[WIDTH];
            apply(rows, (int)c->hidden, c->down + o * c->hidden, c->hidden, s->inner + t * c->hidden, some);
            memcpy(c->y + t * c->out + o, some, (size_t)rows * sizeof(real));
        }
    }
}

int gated_projection(const struct call *c) {
    real *scratch = aligned_alloc(64, (2 * c->tokens * c->hidden * sizeof(real) + 63) / 64 * 64);
    if (!scratch)
        return 1;
    struct scratch s = {c, scratch, scratch + c->tokens * c->hidden};
    share_out(c->threads, bands_of(c->hidden), gate_and_up, &s);
    for (int64_t t = 0; t < c->tokens; t++)
        multiply_gate(&s, t);
    share_out(c->threads, bands_of(c->out), project_down, &s);
    free(scratch);
    return 0;
}
