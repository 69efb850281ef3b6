/* A memory of one matrix and chunks of one token on a CPU, forward and backward: linear attention, the delta rules and
   their like. It is the recurrence itself, token by token, with the matrix of a row and head in the cache.

   The matrix W is stored transposed, [in, out], and so is its momentum S. With K = diag(keep), keep = 1 - alpha:
       p = (K W)^T k  if a token decays first, else W^T k        e = the half error of p against v
       S = eta S - 2 theta k e^T  (without momentum, S = -2 theta k e^T)        W = K W + S
   A token is one pass over W: it is moved, read by a query, and multiplied by the next token's key.

   Tokens come in segments of `interval`. For backward, forward saves the state at the start of each segment; backward
   goes through the segments from the last to the first, computes a segment's states again, and differentiates its tokens
   in reverse, again in one pass over W for each. */

#include "cpu_runtime/matvec.h"
#include "cpu_runtime/tensors.h"
#include "objective.h"

#include <omp.h>
#include <stdlib.h>

enum { FORWARD = 4, BACKWARD = 2 /* registers of outputs at a time */ };

typedef struct {
    int64_t batch, time, heads, in, out, loss, momentum, channels, first, after, backward, threads, interval;
    int64_t saved_numbers; /* of one row and head */
    tokens q, k, v, theta, eta, alpha, y;
    tokens grad_q, grad_k, grad_v, grad_theta, grad_eta, grad_alpha, grad_y;
    int32_t *order, *count; /* [batch, time], [batch]: the tokens each row has; null: all */
    real *saved;
    matrices before[2], end[2], grad_before[2], grad_end[2]; /* weights, momentum */
    double p, delta, smooth;                                 /* of the loss */
} call;

typedef struct {
    int in, out, rows, width, parts; /* rows, width: in, out padded */
    objective objective;
    /* of a segment: [n, rows] */
    real *q, *k, *keep, *seen; /* seen: the key that p is taken with */
    real *grad_q, *grad_k, *grad_keep;
    /* [n, width] */
    real *v, *p, *e, *y, *grad_v;
    /* [n] */
    real *theta, *eta, *alpha, *grad_theta, *grad_eta, *grad_alpha;
    real *step, *de, *z; /* [width] */
    real *none;          /* zeros, as many as a row of any of these has */
    real *state;         /* [parts * rows, width]; backward: one before each token, and one after the last */
    real *grad;          /* of the state */
} work;

static size_t lay_out(const call *call, real *start, work *w) {
    int n = (int)call->interval, in = (int)call->in, out = (int)call->out, rows = padded(in), width = padded(out);
    int parts = call->momentum ? 2 : 1, wider = max(rows, width);
    size_t used = 0, size = (size_t)parts * rows * width, line = 64 / sizeof(real);
    *w = (work){.in = in, .out = out, .rows = rows, .width = width, .parts = parts,
                .objective = {(enum loss)call->loss, (real)call->p, (real)call->delta, (real)call->smooth}};
    struct {
        real **at;
        size_t numbers;
    } all[] = {{&w->q, n * rows}, {&w->k, n * rows}, {&w->keep, n * rows}, {&w->seen, n * rows},
               {&w->grad_q, n * rows}, {&w->grad_k, n * rows}, {&w->grad_keep, n * rows},
               {&w->v, n * width}, {&w->p, (n + 1) * width}, {&w->e, n * width}, {&w->y, (n + 1) * width},
               {&w->grad_v, n * width}, {&w->theta, n}, {&w->eta, n}, {&w->alpha, n}, {&w->grad_theta, n},
               {&w->grad_eta, n}, {&w->grad_alpha, n}, {&w->step, width}, {&w->de, width}, {&w->z, width},
               {&w->none, wider}, {&w->state, size * (call->backward ? n + 1 : 1)},
               {&w->grad, call->backward ? size : 0}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        *all[i].at = start ? start + used : NULL;
        used += (all[i].numbers + line - 1) / line * line;
    }
    return used;
}

/* -- passes over the matrix ----------------------------------------------------------------------------------------- */

/* p = W^T seen and y = W^T x */
INLINE void look(int vectors, int in, int width, const real *W, const real *seen, real *p, const real *x, real *y) {
    vec total[FORWARD] = {}, read[FORWARD] = {};
    for (int i = 0; i < in; i++)
        for (int r = 0; r < vectors; r++) {
            vec w = load_vec(W + (size_t)i * width + r * WIDTH);
            total[r] += w * seen[i];
            read[r] += w * x[i];
        }
    for (int r = 0; r < vectors; r++) {
        store_vec(p + r * WIDTH, total[r]);
        store_vec(y + r * WIDTH, read[r]);
    }
}

/* S = eta S + k step^T, W = K W + S from `from` to `to`; then p = W^T seen and y = W^T x */
INLINE void move(int vectors, int momentum, int in, int width, size_t part, const real *from, real *to,
                 const real *keep, const real *k, const real *step, real eta, const real *seen, real *p, const real *x,
                 real *y) {
    vec total[FORWARD] = {}, read[FORWARD] = {}, added[FORWARD];
    for (int r = 0; r < vectors; r++)
        added[r] = load_vec(step + r * WIDTH);
    for (int i = 0; i < in; i++)
        for (int r = 0; r < vectors; r++) {
            size_t at = (size_t)i * width + r * WIDTH;
            vec s = added[r] * k[i];
            if (momentum) {
                s += load_vec(from + part + at) * eta;
                store_vec(to + part + at, s);
            }
            vec w = load_vec(from + at) * keep[i] + s;
            store_vec(to + at, w);
            total[r] += w * seen[i];
            read[r] += w * x[i];
        }
    for (int r = 0; r < vectors; r++) {
        store_vec(p + r * WIDTH, total[r]);
        store_vec(y + r * WIDTH, read[r]);
    }
}

static __attribute__((noinline)) void look_all(const work *w, const real *W, const real *seen, real *p, const real *x,
                                               real *y) {
    int o = 0;
    for (; o + FORWARD * WIDTH <= w->width; o += FORWARD * WIDTH)
        look(FORWARD, w->in, w->width, W + o, seen, p + o, x, y + o);
    for (; o < w->width; o += WIDTH)
        look(1, w->in, w->width, W + o, seen, p + o, x, y + o);
}

static __attribute__((noinline)) void move_all(const work *w, const real *from, real *to, int t, const real *seen,
                                               real *p, const real *x, real *y) {
    const real *keep = w->keep + (size_t)t * w->rows, *k = w->k + (size_t)t * w->rows;
    size_t part = (size_t)w->rows * w->width;
    int o = 0;
#define MOVE(vectors, momentum) \
    move(vectors, momentum, w->in, w->width, part, from + o, to + o, keep, k, w->step + o, w->eta[t], seen, p + o, x, \
         y + o)
    if (w->parts == 2) {
        for (; o + FORWARD * WIDTH <= w->width; o += FORWARD * WIDTH)
            MOVE(FORWARD, 1);
        for (; o < w->width; o += WIDTH)
            MOVE(1, 1);
    } else {
        for (; o + FORWARD * WIDTH <= w->width; o += FORWARD * WIDTH)
            MOVE(FORWARD, 0);
        for (; o < w->width; o += WIDTH)
            MOVE(1, 0);
    }
#undef MOVE
}

/* -- forward -------------------------------------------------------------------------------------------------------- */

static piece segment(const call *call, int64_t index, int start) {
    int64_t row = index / call->heads;
    int count = (int)(call->count ? call->count[row] : call->time);
    return (piece){row, index % call->heads, call->order ? call->order + row * call->time : NULL, start,
                   min(count - start, (int)call->interval)};
}

static void load_segment(const call *call, const piece *p, work *w) {
    load(&call->q, p, w->in, w->q);
    load(&call->k, p, w->in, w->k);
    load(&call->v, p, w->out, w->v);
    load_gate(&call->theta, p, w->theta, 0);
    load_gate(&call->eta, p, w->eta, 0);
    if (call->channels)
        load(&call->alpha, p, w->in, w->keep);
    else
        load_gate(&call->alpha, p, w->alpha, 0);
    for (int t = 0; t < p->n; t++)
        for (int i = t * w->rows; i < (t + 1) * w->rows; i++) {
            w->keep[i] = 1 - (call->channels ? w->keep[i] : w->alpha[t]);
            w->seen[i] = call->first ? w->keep[i] * w->k[i] : w->k[i];
        }
}

/* The tokens of a segment. `states`: the state before each token is kept, one after the other. */
static void run_segment(const call *call, int n, work *w, int states) {
    size_t size = (size_t)w->parts * w->rows * w->width;
    int rows = w->rows, width = w->width;
    look_all(w, w->state, w->seen, w->p, w->q, w->y); /* y: what is read before the first token */
    for (int t = 0; t < n; t++) {
        real *from = w->state + (states ? t * size : 0), *to = from + (states ? size : 0), *e = w->e + t * width;
        half_error(&w->objective, width, w->p + t * width, w->v + t * width, e);
        for (int o = 0; o < width; o += WIDTH)
            store_vec(w->step + o, load_vec(e + o) * (-2 * w->theta[t]));
        int later = t + 1 < n, reader = call->after ? t : t + 1;
        move_all(w, from, to, t, later ? w->seen + (t + 1) * rows : w->none, w->p + (t + 1) * width,
                 reader < n ? w->q + reader * rows : w->none, w->y + reader * width);
    }
}

static void load_state(const work *w, const piece *p, const matrices *from, real *to) {
    for (int part = 0; part < w->parts; part++)
        load_matrix(w->in, w->out, &from[part], p->row, p->head, to + (size_t)part * w->rows * w->width, w->width);
}

static void store_state(const work *w, const piece *p, const matrices *to, const real *from) {
    for (int part = 0; part < w->parts; part++)
        store_matrix(w->in, w->out, &to[part], p->row, p->head, from + (size_t)part * w->rows * w->width, w->width);
}

static void forward_task(const call *call, int64_t index, work *w) {
    piece p = segment(call, index, 0);
    size_t size = (size_t)w->parts * w->rows * w->width;
    real *saved = call->saved ? call->saved + index * call->saved_numbers : NULL;
    load_state(w, &p, call->before, w->state);
    for (; p.n > 0; p = segment(call, index, p.first + p.n)) {
        if (saved && p.first)
            memcpy(saved + (p.first / call->interval - 1) * size, w->state, size * sizeof(real));
        load_segment(call, &p, w);
        run_segment(call, p.n, w, 0);
        store(&call->y, &p, w->out, w->y);
    }
    store_state(w, &p, call->end, w->state);
}

/* -- backward ------------------------------------------------------------------------------------------------------- */

/* One token, from the gradient of the state after it to that of the state before it. */
typedef struct {
    int t, first, start;           /* start: no token of the segment is before it */
    const real *before, *read;     /* the state before it; W as it was read */
    const real *dp, *gy;           /* the gradients of p and y */
    const real *reader, *gradient; /* of the next read on the way back: its query, and the gradient of its y */
    const real *k;                 /* the key of the token before it */
} turn;

/* Sums along the rows of W, to be added up. */
typedef struct {
    vec error[WIDTH], kept[WIDTH], seen[WIDTH], read[WIDTH];
} along;

INLINE void turn_row(int vectors, int momentum, const work *w, const turn *x, int o, int i, real *G, int row,
                     along *along, vec *z, vec *of_eta) {
    size_t part = (size_t)w->rows * w->width;
    vec error = {}, kept = {}, seen = {}, read = {};
    real keep = w->keep[x->t * w->rows + i], key = w->seen[x->t * w->rows + i], eta = w->eta[x->t];
    for (int r = 0; r < vectors; r++, o += WIDTH) {
        size_t at = (size_t)i * w->width + o;
        vec g = load_vec(G + at), h = g, before = load_vec(x->before + at), dp = load_vec(x->dp + o);
        if (momentum) {
            h = load_vec(G + part + at);
            *of_eta += h * load_vec(x->before + part + at);
        }
        error += h * load_vec(w->e + x->t * w->width + o);
        kept += g * before;
        seen += dp * before;
        read += load_vec(x->gy + o) * load_vec(x->read + at);
        g = g * keep + dp * key + load_vec(x->gradient + o) * x->reader[i];
        store_vec(G + at, g);
        if (momentum) {
            h = h * eta + (x->start ? (vec){} : g);
            store_vec(G + part + at, h);
        } else
            h = g;
        z[r] += h * x->k[i];
    }
    along->error[row] = error;
    along->kept[row] = kept;
    along->seen[row] = seen;
    along->read[row] = read;
}

INLINE void turn_columns(int vectors, int momentum, const work *w, const turn *x, int o, vec *of_eta) {
    real *grad_k = w->grad_k + x->t * w->rows, *grad_q = w->grad_q + x->t * w->rows,
         *grad_keep = w->grad_keep + x->t * w->rows;
    const real *k = w->k + x->t * w->rows, *keep = w->keep + x->t * w->rows;
    vec z[BACKWARD] = {};
    for (int i = 0; i < w->rows; i += WIDTH) {
        along a;
        int rows = min(WIDTH, w->in - i);
        for (int row = 0; row < rows; row++)
            turn_row(vectors, momentum, w, x, o, i + row, w->grad, row, &a, z, of_eta);
        for (int row = rows; row < WIDTH; row++)
            a.error[row] = a.kept[row] = a.seen[row] = a.read[row] = (vec){};
        vec to_q = sums(a.read), to_keep = sums(a.kept), back = sums(a.seen), to_k = sums(a.error) * (-2 * w->theta[x->t]);
        to_k += x->first ? back * load_vec(keep + i) : back;
        if (x->first)
            to_keep += back * load_vec(k + i);
        store_vec(grad_q + i, o ? load_vec(grad_q + i) + to_q : to_q);
        store_vec(grad_k + i, o ? load_vec(grad_k + i) + to_k : to_k);
        store_vec(grad_keep + i, o ? load_vec(grad_keep + i) + to_keep : to_keep);
    }
    for (int r = 0; r < vectors; r++)
        store_vec(w->z + o + r * WIDTH, z[r]);
}

static __attribute__((noinline)) real turn_all(const work *w, const turn *x) {
    vec of_eta = {};
    int o = 0;
    if (w->parts == 2) {
        for (; o + BACKWARD * WIDTH <= w->width; o += BACKWARD * WIDTH)
            turn_columns(BACKWARD, 1, w, x, o, &of_eta);
        for (; o < w->width; o += WIDTH)
            turn_columns(1, 1, w, x, o, &of_eta);
    } else {
        for (; o + BACKWARD * WIDTH <= w->width; o += BACKWARD * WIDTH)
            turn_columns(BACKWARD, 0, w, x, o, &of_eta);
        for (; o < w->width; o += WIDTH)
            turn_columns(1, 0, w, x, o, &of_eta);
    }
    return sum(of_eta);
}

/* Before the last token of a segment is turned: what its read adds to the gradient, and z. */
static void begin(const call *call, const work *w, int t) {
    size_t part = (size_t)w->rows * w->width;
    const real *q = w->q + t * w->rows, *k = w->k + t * w->rows, *gy = w->y + t * w->width;
    memset(w->z, 0, w->width * sizeof(real));
    for (int i = 0; i < w->in; i++)
        for (int o = 0; o < w->width; o += WIDTH) {
            real *G = w->grad + (size_t)i * w->width + o;
            vec h = load_vec(G);
            if (call->after)
                h += load_vec(gy + o) * q[i];
            store_vec(G, h);
            if (w->parts == 2) {
                h += load_vec(G + part);
                store_vec(G + part, h);
            }
            store_vec(w->z + o, load_vec(w->z + o) + h * k[i]);
        }
}

static void turn_segment(const call *call, int n, work *w) {
    size_t size = (size_t)w->parts * w->rows * w->width;
    int rows = w->rows, width = w->width;
    begin(call, w, n - 1);
    for (int t = n - 1; t >= 0; t--) {
        const real *e = w->e + t * width;
        vec along = {};
        for (int o = 0; o < width; o += WIDTH) {
            vec z = load_vec(w->z + o);
            along += z * load_vec(e + o);
            store_vec(w->de + o, z * (-2 * w->theta[t]));
        }
        w->grad_theta[t] = -2 * sum(along);
        half_error_backward(&w->objective, width, w->p + t * width, w->v + t * width, w->de, w->de,
                            w->grad_v + t * width);
        int reader = call->after ? t - 1 : t;
        const real *before = w->state + t * size;
        turn x = {.t = t, .first = (int)call->first, .start = t == 0, .before = before,
                  .read = call->after ? before + size : before, .dp = w->de, .gy = w->y + t * width,
                  .reader = reader < 0 ? w->none : w->q + reader * rows,
                  .gradient = reader < 0 ? w->none : w->y + reader * width, .k = t ? w->k + (t - 1) * rows : w->none};
        w->grad_eta[t] = turn_all(w, &x);
        real total = 0;
        for (int i = 0; i < rows; i++) {
            w->grad_keep[t * rows + i] *= -1;
            total += w->grad_keep[t * rows + i];
        }
        w->grad_alpha[t] = total;
    }
}

static void backward_task(const call *call, int64_t index, work *w) {
    piece p = segment(call, index, 0);
    size_t size = (size_t)w->parts * w->rows * w->width;
    int count = (int)(call->count ? call->count[p.row] : call->time);
    load_state(w, &p, call->grad_end, w->grad);
    for (int start = count ? (count - 1) / (int)call->interval * (int)call->interval : -1; start >= 0;
         start -= (int)call->interval) {
        p = segment(call, index, start);
        if (start)
            memcpy(w->state, call->saved + index * call->saved_numbers + (start / call->interval - 1) * size,
                   size * sizeof(real));
        else
            load_state(w, &p, call->before, w->state);
        load_segment(call, &p, w);
        run_segment(call, p.n, w, 1);
        load(&call->grad_y, &p, w->out, w->y);
        turn_segment(call, p.n, w);
        store(&call->grad_q, &p, w->in, w->grad_q);
        store(&call->grad_k, &p, w->in, w->grad_k);
        store(&call->grad_v, &p, w->out, w->grad_v);
        store_gate(&call->grad_theta, &p, w->grad_theta);
        store_gate(&call->grad_eta, &p, w->grad_eta);
        if (call->channels)
            store(&call->grad_alpha, &p, w->in, w->grad_keep);
        else
            store_gate(&call->grad_alpha, &p, w->grad_alpha);
    }
    store_state(w, &p, call->grad_before, w->grad);
}

/* Returns 1 if there is no memory for the work buffers. */
int memory_linear_run(const call *call) {
    work first;
    size_t numbers = lay_out(call, NULL, &first);
    real *scratch = aligned_alloc(64, call->threads * numbers * sizeof(real));
    if (!scratch)
        return 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->threads)
    for (int64_t i = 0; i < call->batch * call->heads; i++) {
        work w;
        real *start = scratch + omp_get_thread_num() * numbers;
        lay_out(call, start, &w);
        memset(w.none, 0, max(w.rows, w.width) * sizeof(real));
        if (call->backward)
            backward_task(call, i, &w);
        else
            forward_task(call, i, &w);
    }
    free(scratch);
    return 0;
}
