/* A linear map of a few tokens: the weights are read once, whatever the number of tokens. */

#include "few.h"

/* x [tokens, in], with whole registers to read up to its end; weight [out, in]; y [tokens, out] */
struct call {
    int64_t threads, tokens, out, in;
    const real *x, *weight, *bias;
    real *y;
};

/* y = x weight^T + bias */
int project(const struct call *c) {
    int in = (int)c->in;
#pragma omp parallel for num_threads(c->threads) if (c->threads > 1)
    for (int64_t o = 0; o < c->out; o += WIDTH) {
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
    return 0;
}
