/* A linear map of a few tokens: the weights are read once, whatever the number of tokens. */

#include "cpu_runtime/matvec.h"
#include "cpu_runtime/thread_pool.h"

/* x [tokens, in], with whole registers to read up to its end; weight [out, in]; y [tokens, out] */
struct call {
    int64_t threads, tokens, out, in;
    const real *x, *weight, *bias;
    real *y;
};

static void project_band(const void *context, int64_t band, int worker) {
    (void)worker;
    const struct call *c = context;
    int in = (int)c->in;
    for (int64_t o = band * BAND; o < c->out && o < (band + 1) * BAND; o += WIDTH) {
        int rows = (int)(c->out - o < WIDTH ? c->out - o : WIDTH);
        const real *weight = c->weight + o * in;
        for (int64_t t = 0; t < c->tokens; t++) {
            const real *x = c->x + t * in;
            real *y = c->y + t * c->out + o;
            real some[WIDTH];
            apply(rows, in, weight, in, x, some);
            for (int r = 0; r < rows; r++)
                y[r] = some[r] + (c->bias ? c->bias[o + r] : 0);
        }
    }
}

/* y = x weight^T + bias */
int project(const struct call *c) {
    share_out(c->threads, bands_of(c->out), project_band, c);
    return 0;
}
