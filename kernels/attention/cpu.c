/* Causal attention with a window and a prefix, forward and backward, for one row and key-value head at a time.

   Scores are computed for a block of queries and a tile of keys at a time, and a running maximum and sum per query make
   one softmax over all tiles, the prefix's included. Backward recomputes the scores from the log-sum-exp of every query.
   Tiles that no query of a block sees are skipped. */

#include <stdlib.h>

#include "cpu_runtime/matrix.h"

enum { QUERIES = 64, KEYS = 128 };

/* [batch, time, heads, d]; the last dimension is dense */
typedef struct {
    real *data;
    int64_t batch, time, head;
} sequence;

/* A set of keys: those of the sequence, or the prefix. */
typedef struct {
    sequence q, k, v, grad_q, grad_k, grad_v;
    int64_t count;
    int64_t always; /* every query sees all of them */
} keys;

typedef struct {
    int64_t batch, time, heads, kv_heads, d, window, step; /* window 0: none; step: keys from a query to the next */
    keys sets[2];
    int64_t *start; /* [batch]: the first visible key of each row; null: 0 */
    sequence y, grad_y;
    real *lse; /* [batch, heads, time]; null: there will be no backward */
    int64_t backward, threads;
} attend;

typedef struct {
    real *k, *v;          /* [count, width] */
    real *kt, *vt;        /* transposed tile by tile: [tiles][width][KEYS] */
    real *grad_k, *grad_v;
} packed_keys;

static size_t tiles_of(const keys *set) { return (size_t)(set->count + KEYS - 1) / KEYS; }

static real *take(real **next, size_t numbers) {
    real *found = *next;
    *next += (numbers + 15) / 16 * 16;
    return found;
}

static void allocate_keys(const attend *call, const keys *set, packed_keys *to, int backward, real **next) {
    size_t width = padded((int)call->d), numbers = tiles_of(set) * KEYS * width;
    to->k = backward ? take(next, numbers) : NULL;
    to->v = take(next, numbers);
    to->kt = take(next, numbers);
    to->vt = backward ? take(next, numbers) : NULL;
    to->grad_k = backward ? take(next, numbers) : NULL;
    to->grad_v = backward ? take(next, numbers) : NULL;
}

static const real *row_of(const sequence *x, int64_t row, int64_t t, int64_t head) {
    return x->data + row * x->batch + t * x->time + head * x->head;
}

static void load_rows(const sequence *x, int64_t row, int64_t head, int64_t first, int64_t n, int d, real *to,
                      real scale) {
    int width = padded(d);
    for (int64_t i = 0; i < n; i++) {
        const real *from = row_of(x, row, first + i, head);
        for (int j = 0; j < d; j++)
            to[i * width + j] = from[j] * scale;
        for (int j = d; j < width; j++)
            to[i * width + j] = 0;
    }
}

static void store_rows(const sequence *x, int64_t row, int64_t head, int64_t first, int64_t n, int d, const real *from,
                       real scale) {
    int width = padded(d);
    for (int64_t i = 0; i < n; i++) {
        real *to = (real *)row_of(x, row, first + i, head);
        for (int j = 0; j < d; j++)
            to[j] = from[i * width + j] * scale;
    }
}

static void load_keys(const attend *call, const keys *set, int64_t row, int64_t head, packed_keys *to, int backward,
                      real *rows) {
    int d = (int)call->d, width = padded(d);
    for (size_t tile = 0; tile < tiles_of(set); tile++) {
        int64_t first = tile * KEYS, n = set->count - first < KEYS ? set->count - first : KEYS;
        size_t place = tile * KEYS * width;
        real *k = backward ? to->k + place : rows;
        load_rows(&set->k, row, head, first, n, d, k, 1);
        load_rows(&set->v, row, head, first, n, d, to->v + place, 1);
        transpose((int)n, d, k, width, to->kt + place, KEYS);
        if (backward) {
            transpose((int)n, d, to->v + place, width, to->vt + place, KEYS);
            memset(to->grad_k + place, 0, (size_t)KEYS * width * sizeof(real));
            memset(to->grad_v + place, 0, (size_t)KEYS * width * sizeof(real));
        }
    }
}

/* The keys [from, to) that a query sees. */
typedef struct {
    int64_t from, to;
} range;

static range visible(const attend *call, const keys *set, int64_t row, int64_t i) {
    if (set->always)
        return (range){0, set->count};
    int64_t place = set->count - 1 - (call->time - 1 - i) * call->step;
    int64_t from = call->window ? place - call->window + 1 : 0;
    int64_t start = call->start ? call->start[row] : 0;
    from = from > start ? from : start;
    return (range){from > 0 ? from : 0, place + 1};
}

/* The same within a tile that begins at key `first`. */
static range in_tile(range s, int64_t first) {
    s.from = s.from > first ? s.from - first : 0;
    s.to = s.to - first < KEYS ? s.to - first : KEYS;
    return s;
}

static const real places[KEYS] = {
#define TEN(n) n + 0, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7, n + 8, n + 9
    TEN(0),  TEN(10), TEN(20), TEN(30),  TEN(40),  TEN(50),  TEN(60),
    TEN(70), TEN(80), TEN(90), TEN(100), TEN(110), 120,      121,
    122,     123,     124,     125,      126,      127,
};

INLINE ints counts(int j, range s) {
    vec place = load_vec(places + j);
    return (place >= (real)s.from) & (place < (real)s.to);
}

typedef struct {
    packed_keys packed[2];
    real *q[2], *grad_q[2], *y, *grad_y, *scores, *grad_scores, *rows;
    real *maximum, *total, *delta;
} workspace;

static workspace workspace_of(const attend *call, real *scratch, int backward, size_t *numbers) {
    size_t block = (size_t)QUERIES * padded((int)call->d), pairs = QUERIES * KEYS;
    real *start = scratch ? scratch : (real *)64, *next = start;
    workspace r = {0};
    for (int s = 0; s < 2; s++) {
        allocate_keys(call, &call->sets[s], &r.packed[s], backward, &next);
        r.q[s] = take(&next, block);
        r.grad_q[s] = backward ? take(&next, block) : NULL;
    }
    r.y = take(&next, block);
    r.grad_y = backward ? take(&next, block) : NULL;
    r.scores = take(&next, pairs);
    r.grad_scores = backward ? take(&next, pairs) : NULL;
    r.rows = backward ? NULL : take(&next, (size_t)KEYS * padded((int)call->d));
    r.maximum = take(&next, QUERIES);
    r.total = take(&next, QUERIES);
    r.delta = take(&next, QUERIES);
    if (numbers)
        *numbers = next - start;
    return r;
}

static void forward_block(const attend *call, workspace *r, int64_t row, int64_t head, int64_t first, int n) {
    int d = (int)call->d, width = padded(d);
    real scale = (real)(1 / sqrt((double)d));
    for (int i = 0; i < n; i++) {
        r->maximum[i] = -(real)INFINITY;
        r->total[i] = 0;
    }
    memset(r->y, 0, (size_t)n * width * sizeof(real));
    for (int s = 0; s < 2; s++) {
        const keys *set = &call->sets[s];
        if (!set->count)
            continue;
        load_rows(&set->q, row, head, first, n, d, r->q[s], scale);
        range low = visible(call, set, row, first), high = visible(call, set, row, first + n - 1);
        for (int64_t tile = low.from / KEYS; tile * KEYS < high.to; tile++) {
            size_t place = (size_t)tile * KEYS * width;
            int reach = padded((int)in_tile(high, tile * KEYS).to);
            multiply(n, reach, d, r->q[s], width, r->packed[s].kt + place, KEYS, r->scores, KEYS, SET);
            for (int i = 0; i < n; i++) {
                range mine = in_tile(visible(call, set, row, first + i), tile * KEYS);
                real *score = r->scores + i * KEYS, before = r->maximum[i], now;
                vec top = all(before);
                for (int j = 0; j < reach; j += WIDTH) {
                    vec x = pick(counts(j, mine), load_vec(score + j), all(-(real)INFINITY));
                    top = pick(x > top, x, top);
                }
                now = top[0];
                for (int j = 1; j < WIDTH; j++)
                    now = top[j] > now ? top[j] : now;
                if (mine.to <= mine.from) {
                    memset(score, 0, reach * sizeof(real));
                    continue;
                }
                vec total = {};
                for (int j = 0; j < reach; j += WIDTH) {
                    vec p = pick(counts(j, mine), exponential(load_vec(score + j) - now), (vec){});
                    total += p;
                    store_vec(score + j, p);
                }
                real left = before == -(real)INFINITY ? 0 : (real)exp((double)(before - now));
                r->maximum[i] = now;
                r->total[i] = r->total[i] * left + sum(total);
                if (left != 1)
                    for (int j = i * width; j < (i + 1) * width; j += WIDTH)
                        store_vec(r->y + j, load_vec(r->y + j) * left);
            }
            int count = min((int)(set->count - tile * KEYS), reach);
            multiply(n, width, count, r->scores, KEYS, r->packed[s].v + place, width, r->y, width, ADD);
        }
    }
    for (int i = 0; i < n; i++) {
        real total = r->total[i], inverse = total > 0 ? 1 / total : total == 0 ? 0 : total; /* NaN stays */
        for (int j = i * width; j < (i + 1) * width; j += WIDTH)
            store_vec(r->y + j, load_vec(r->y + j) * inverse);
        if (call->lse)
            call->lse[(row * call->heads + head) * call->time + first + i] =
                total == 0 ? (real)INFINITY : r->maximum[i] + (real)log((double)total);
    }
    store_rows(&call->y, row, head, first, n, d, r->y, 1);
}

static void backward_block(const attend *call, workspace *r, int64_t row, int64_t head, int64_t first, int n) {
    int d = (int)call->d, width = padded(d);
    real scale = (real)(1 / sqrt((double)d));
    const real *lse = call->lse + (row * call->heads + head) * call->time + first;
    load_rows(&call->y, row, head, first, n, d, r->y, 1);
    load_rows(&call->grad_y, row, head, first, n, d, r->grad_y, 1);
    for (int i = 0; i < n; i++) {
        vec along = {};
        for (int j = i * width; j < (i + 1) * width; j += WIDTH)
            along += load_vec(r->y + j) * load_vec(r->grad_y + j);
        r->delta[i] = sum(along);
    }
    for (int s = 0; s < 2; s++) {
        const keys *set = &call->sets[s];
        if (!set->count)
            continue;
        load_rows(&set->q, row, head, first, n, d, r->q[s], scale);
        memset(r->grad_q[s], 0, (size_t)n * width * sizeof(real));
        range low = visible(call, set, row, first), high = visible(call, set, row, first + n - 1);
        for (int64_t tile = low.from / KEYS; tile * KEYS < high.to; tile++) {
            size_t place = (size_t)tile * KEYS * width;
            int reach = padded((int)in_tile(high, tile * KEYS).to);
            int count = min((int)(set->count - tile * KEYS), reach);
            multiply(n, reach, d, r->q[s], width, r->packed[s].kt + place, KEYS, r->scores, KEYS, SET);
            multiply(n, reach, d, r->grad_y, width, r->packed[s].vt + place, KEYS, r->grad_scores, KEYS, SET);
            for (int i = 0; i < n; i++) {
                range mine = in_tile(visible(call, set, row, first + i), tile * KEYS);
                real *score = r->scores + i * KEYS, *grad_scores = r->grad_scores + i * KEYS;
                for (int j = 0; j < reach; j += WIDTH) {
                    vec x = load_vec(score + j) - lse[i]; /* above zero by rounding at most */
                    vec p = pick(counts(j, mine), exponential(pick(x > 0, (vec){}, x)), (vec){});
                    store_vec(score + j, p);
                    store_vec(grad_scores + j,
                              pick(counts(j, mine), p * (load_vec(grad_scores + j) - r->delta[i]), (vec){}));
                }
            }
            multiply_transposed(count, width, n, r->scores, KEYS, r->grad_y, width, r->packed[s].grad_v + place, width,
                                ADD);
            multiply_transposed(count, width, n, r->grad_scores, KEYS, r->q[s], width, r->packed[s].grad_k + place, width, ADD);
            multiply(n, width, count, r->grad_scores, KEYS, r->packed[s].k + place, width, r->grad_q[s], width, ADD);
        }
        store_rows(&set->grad_q, row, head, first, n, d, r->grad_q[s], scale);
    }
}

static void run_task(const attend *call, int64_t task, real *scratch) {
    int64_t row = task / call->kv_heads, shared = task % call->kv_heads, group = call->heads / call->kv_heads;
    int backward = (int)call->backward;
    workspace r = workspace_of(call, scratch, backward, NULL);
    for (int s = 0; s < 2; s++)
        load_keys(call, &call->sets[s], row, shared, &r.packed[s], backward, r.rows);
    for (int64_t head = shared * group; head < (shared + 1) * group; head++)
        for (int64_t first = 0; first < call->time; first += QUERIES) {
            int n = (int)(call->time - first < QUERIES ? call->time - first : QUERIES);
            if (backward)
                backward_block(call, &r, row, head, first, n);
            else
                forward_block(call, &r, row, head, first, n);
        }
    for (int s = 0; backward && s < 2; s++) {
        const keys *set = &call->sets[s];
        store_rows(&set->grad_k, row, shared, 0, set->count, (int)call->d, r.packed[s].grad_k, 1);
        store_rows(&set->grad_v, row, shared, 0, set->count, (int)call->d, r.packed[s].grad_v, 1);
    }
}

/* Returns 1 where there is no memory left. */
int attention_run(const attend *call) {
    size_t numbers;
    int failed = 0;
    workspace_of(call, NULL, (int)call->backward, &numbers);
#pragma omp parallel num_threads(call->threads) reduction(| : failed)
    {
        real *scratch = aligned_alloc(64, (numbers * sizeof(real) + 63) / 64 * 64);
        failed = !scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < call->batch * call->kv_heads; task++)
            if (scratch)
                run_task(call, task, scratch);
        free(scratch);
    }
    return failed;
}
