/* Asking a memory without teaching it: the network at fixed weights, for many queries, forward and backward.

   A row and head's queries go through all layers a block at a time. Backward goes through them again first, so that
   nothing but queries and weights has to be kept. */

#include <stdlib.h>

#include "cpu_runtime/activation.h"
#include "layer_norm.h"
#include "cpu_runtime/tensors.h"

enum { LAYERS = 16, BLOCK = 128 };

typedef struct {
    int64_t batch, time, heads, layers, activation;
    int64_t widths[LAYERS + 1];
    tokens q, y, grad_q, grad_y;
    real *gain, *grad_gain; /* [heads, d], [batch, heads, d]; null: no norm */
    matrices weights[LAYERS], grad_weights[LAYERS];
    int64_t backward, threads;
} asking;

typedef struct {
    int layers, top, width; /* width: of the widest layer, padded */
    int in[LAYERS], out[LAYERS];
    real *straight[LAYERS], *reversed[LAYERS], *grad[LAYERS]; /* [in, out]; [out, in]; [in, out] */
    real *z[LAYERS];                                          /* outputs of the layers, [block, out] */
    real *q, *x, *slope, *g, *below, *n, *gain, *grad_gain;
} room;

static real *take(real *start, size_t *used, size_t numbers) {
    real *found = start ? start + *used : NULL;
    *used += (numbers + 15) / 16 * 16;
    return found;
}

static room rooms(const asking *call, real *start, size_t *used) {
    room r = {.layers = (int)call->layers, .top = (int)call->layers - 1};
    *used = 0;
    r.width = padded((int)call->widths[0]);
    for (int l = 0; l < r.layers; l++) {
        int in = r.in[l] = (int)call->widths[l], out = r.out[l] = (int)call->widths[l + 1];
        size_t size = (size_t)padded(in) * padded(out);
        r.width = most(r.width, padded(out));
        r.straight[l] = take(start, used, size);
        r.z[l] = take(start, used, (size_t)BLOCK * padded(out));
        if (call->backward) {
            r.reversed[l] = take(start, used, size);
            r.grad[l] = take(start, used, size);
        }
    }
    real **blocks[] = {&r.q, &r.x, &r.slope, &r.g, &r.below};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        *blocks[i] = take(start, used, (size_t)BLOCK * r.width);
    r.n = take(start, used, r.width);
    r.gain = take(start, used, r.width);
    r.grad_gain = take(start, used, r.width);
    return r;
}

static void forward(const asking *call, room *r, int n) {
    const real *x = r->q;
    for (int l = 0; l < r->layers; l++) {
        int rows = padded(r->in[l]), width = padded(r->out[l]);
        if (l) {
            activate_each((enum activation)call->activation, n * rows, r->z[l - 1], r->x, NULL, NULL);
            x = r->x;
        }
        multiply(n, width, r->in[l], x, rows, r->straight[l], width, r->z[l], width, SET);
    }
}

static void conclude(const asking *call, room *r, const piece *p) {
    int out = r->out[r->top], width = padded(out);
    real *z = r->z[r->top];
    if (call->gain)
        for (int t = 0; t < p->n; t++) {
            normalise(out, z + t * width, r->n);
            for (int i = 0; i < width; i += WIDTH)
                put(z + t * width + i, get(r->q + t * width + i) + get(r->n + i) * get(r->gain + i));
        }
    store(&call->y, p, out, z);
}

static void backward(const asking *call, room *r, const piece *p) {
    int out = r->out[r->top], last = padded(out), n = p->n;
    real *g = r->g;
    load(&call->grad_y, p, out, g);
    if (call->gain)
        for (int t = 0; t < n; t++) {
            real *gt = g + t * last, inverse = normalise(out, r->z[r->top] + t * last, r->n);
            for (int i = 0; i < last; i += WIDTH) {
                put(r->grad_gain + i, get(r->grad_gain + i) + get(gt + i) * get(r->n + i));
                put(gt + i, get(gt + i) * get(r->gain + i));
            }
            pull(out, gt, r->n, inverse, gt);
        }
    for (int l = r->top; l >= 0; l--) {
        int rows = padded(r->in[l]), width = padded(r->out[l]);
        const real *x = r->q;
        if (l) {
            activate_each((enum activation)call->activation, n * rows, r->z[l - 1], r->x, r->slope, NULL);
            x = r->x;
        }
        multiply_transposed(r->in[l], width, n, x, rows, g, width, r->grad[l], width, ADD);
        multiply(n, rows, r->out[l], g, width, r->reversed[l], rows, r->below, rows, SET);
        for (int i = 0; i < n * rows; i += WIDTH)
            put(g + i, l ? get(r->below + i) * get(r->slope + i) : get(r->below + i));
    }
    if (call->gain) {
        load(&call->grad_y, p, out, r->below);
        for (int i = 0; i < n * last; i += WIDTH)
            put(g + i, get(g + i) + get(r->below + i));
    }
    store(&call->grad_q, p, r->in[0], g);
}

static void run_task(const asking *call, int64_t task, real *scratch) {
    size_t used;
    room r = rooms(call, scratch, &used);
    piece p = {.row = task / call->heads, .head = task % call->heads};
    int out = r.out[r.top], width = padded(out);
    for (int l = 0; l < r.layers; l++) {
        int rows = padded(r.in[l]), wide = padded(r.out[l]);
        load_matrix(r.in[l], r.out[l], &call->weights[l], p.row, p.head, r.straight[l]);
        if (call->backward) {
            transpose(rows, r.out[l], r.straight[l], wide, r.reversed[l], rows);
            memset(r.grad[l], 0, (size_t)rows * wide * sizeof(real));
        }
    }
    memset(r.grad_gain, 0, width * sizeof(real));
    if (call->gain) {
        memset(r.gain, 0, width * sizeof(real));
        memcpy(r.gain, call->gain + p.head * out, out * sizeof(real));
    }
    for (int64_t first = 0; first < call->time; first += BLOCK) {
        p.first = (int)first;
        p.n = (int)(call->time - first < BLOCK ? call->time - first : BLOCK);
        load(&call->q, &p, r.in[0], r.q);
        forward(call, &r, p.n);
        if (call->backward)
            backward(call, &r, &p);
        else
            conclude(call, &r, &p);
    }
    if (!call->backward)
        return;
    for (int l = 0; l < r.layers; l++)
        store_matrix(r.in[l], r.out[l], &call->grad_weights[l], p.row, p.head, r.grad[l]);
    if (call->grad_gain)
        memcpy(call->grad_gain + task * out, r.grad_gain, out * sizeof(real));
}

/* Returns 1 where there is no memory left. */
int read_run(const asking *call) {
    size_t numbers;
    int failed = 0;
    rooms(call, NULL, &numbers);
#pragma omp parallel num_threads(call->threads) reduction(| : failed)
    {
        real *scratch = aligned_alloc(64, (numbers * sizeof(real) + 63) / 64 * 64);
        failed = !scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < call->batch * call->heads; task++)
            if (scratch)
                run_task(call, task, scratch);
        free(scratch);
    }
    return failed;
}
