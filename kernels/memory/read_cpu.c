/* Reading at fixed weights: the network for many queries, forward and backward.

   A row and head's queries go through all layers a block at a time. Backward recomputes the layers' outputs first, so
   that nothing but queries and weights has to be kept. */

#include <omp.h>
#include <stdlib.h>

#include "cpu_runtime/tensors.h"
#include "network.h"

enum { QUERIES = 128 /* of a block */ };

typedef struct {
    int64_t batch, time, heads, layers, activation, backward, threads;
    int64_t widths[LAYERS + 1];
    tokens q, y, grad_q, grad_y;
    real *gain, *grad_gain; /* [heads, d], [batch, heads, d]; null: no norm */
    matrices weights[LAYERS], grad_weights[LAYERS];
} call;

typedef struct {
    int top;
    int in[LAYERS], out[LAYERS], rows[LAYERS], width[LAYERS];   /* rows, width: in, out, padded */
    real *weights[LAYERS], *transposed[LAYERS], *grad[LAYERS];  /* [in, out]; [out, in]; [in, out] */
    real *z[LAYERS];                                            /* outputs of the layers, [block, out] */
    real *q, *x, *slope, *g, *grad_x, *n, *gain, *grad_gain;
} buffers;

static buffers take_buffers(const call *call, arena *arena) {
    buffers w = {.top = (int)call->layers - 1};
    int widest = padded((int)call->widths[0]);
    for (int l = 0; l <= w.top; l++) {
        w.in[l] = (int)call->widths[l], w.out[l] = (int)call->widths[l + 1];
        w.rows[l] = padded(w.in[l]), w.width[l] = padded(w.out[l]);
        size_t size = (size_t)w.rows[l] * w.width[l];
        widest = max(widest, w.width[l]);
        w.weights[l] = take(arena, size);
        w.z[l] = take(arena, (size_t)QUERIES * w.width[l]);
        if (call->backward) {
            w.transposed[l] = take(arena, size);
            w.grad[l] = take(arena, size);
        }
    }
    real **blocks[] = {&w.q, &w.x, &w.slope, &w.g, &w.grad_x}, **rows[] = {&w.n, &w.gain, &w.grad_gain};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        *blocks[i] = take(arena, (size_t)QUERIES * widest);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        *rows[i] = take(arena, widest);
    return w;
}

/* a layer's input and, where wanted, the activation's slope there */
static const real *input(const call *call, buffers *w, int n, int l, real *slope) {
    if (l == 0)
        return w->q;
    activate_each((enum activation)call->activation, n * w->rows[l], w->z[l - 1], w->x, slope, NULL);
    return w->x;
}

static void read_block(const call *call, buffers *w, const piece *p) {
    for (int l = 0; l <= w->top; l++)
        multiply(p->n, w->width[l], w->in[l], input(call, w, p->n, l, NULL), w->rows[l], w->weights[l], w->width[l],
                 w->z[l], w->width[l], SET);
    if (call->backward)
        return;
    int out = w->out[w->top], width = w->width[w->top];
    real *z = w->z[w->top];
    if (call->gain)
        for (int i = 0; i < p->n * width; i += width)
            norm_read(out, w->q + i, w->gain, z + i, w->n, z + i);
    store(&call->y, p, out, z);
}

static void read_block_backward(const call *call, buffers *w, const piece *p) {
    int out = w->out[w->top], last = w->width[w->top], n = p->n;
    real *g = w->g;
    load(&call->grad_y, p, out, g);
    if (call->gain)
        for (int i = 0; i < n * last; i += last)
            norm_read_backward(out, w->gain, w->z[w->top] + i, w->n, g + i, w->grad_gain);
    for (int l = w->top; l >= 0; l--) {
        int rows = w->rows[l], width = w->width[l];
        const real *x = input(call, w, n, l, w->slope);
        multiply_transposed(w->in[l], width, n, x, rows, g, width, w->grad[l], width, ADD);
        multiply(n, rows, w->out[l], g, width, w->transposed[l], rows, w->grad_x, rows, SET);
        for (int i = 0; i < n * rows; i += WIDTH)
            store_vec(g + i, l ? load_vec(w->grad_x + i) * load_vec(w->slope + i) : load_vec(w->grad_x + i));
    }
    if (call->gain) { /* the residual */
        load(&call->grad_y, p, out, w->grad_x);
        for (int i = 0; i < n * last; i += WIDTH)
            store_vec(g + i, load_vec(g + i) + load_vec(w->grad_x + i));
    }
    store(&call->grad_q, p, w->in[0], g);
}

static void run_task(const call *call, int64_t task, real *scratch) {
    arena arena = {scratch, 0};
    buffers w = take_buffers(call, &arena);
    piece p = {.row = task / call->heads, .head = task % call->heads};
    int out = w.out[w.top], width = w.width[w.top];
    for (int l = 0; l <= w.top; l++) {
        load_matrix(w.in[l], w.out[l], &call->weights[l], p.row, p.head, w.weights[l], padded(w.out[l]));
        if (call->backward) {
            transpose(w.rows[l], w.out[l], w.weights[l], w.width[l], w.transposed[l], w.rows[l]);
            memset(w.grad[l], 0, (size_t)w.rows[l] * w.width[l] * sizeof(real));
        }
    }
    memset(w.grad_gain, 0, width * sizeof(real));
    if (call->gain) {
        memset(w.gain, 0, width * sizeof(real));
        memcpy(w.gain, call->gain + p.head * out, out * sizeof(real));
    }
    for (int64_t first = 0; first < call->time; first += QUERIES) {
        p.first = (int)first;
        p.n = (int)(call->time - first < QUERIES ? call->time - first : QUERIES);
        load(&call->q, &p, w.in[0], w.q);
        read_block(call, &w, &p);
        if (call->backward)
            read_block_backward(call, &w, &p);
    }
    if (!call->backward)
        return;
    for (int l = 0; l <= w.top; l++)
        store_matrix(w.in[l], w.out[l], &call->grad_weights[l], p.row, p.head, w.grad[l], padded(w.out[l]));
    if (call->grad_gain)
        memcpy(call->grad_gain + task * out, w.grad_gain, out * sizeof(real));
}

/* Returns 1 where there is no memory left. */
int read_run(const call *call) {
    arena arena = {0};
    take_buffers(call, &arena);
    real *scratch = aligned_alloc(64, call->threads * arena.used * sizeof(real));
    if (!scratch)
        return 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->threads)
    for (int64_t task = 0; task < call->batch * call->heads; task++)
        run_task(call, task, scratch + omp_get_thread_num() * arena.used);
    free(scratch);
    return 0;
}
