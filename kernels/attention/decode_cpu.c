/* Attention of a few new tokens over a cache: from their projections to the outputs and the cache after them.

   A task is one key-value head of one batch row, with the query heads that share it. Its queries and keys are normalized
   and rotated, and each query meets, in one softmax, the persistent tokens (which have no position: the query before its
   rotation), the cached tokens in its window, and the new ones up to itself. The next cache is written beside them. */

#include "cpu_runtime/matvec.h"
#include "cpu_runtime/thread_pool.h"

#include <stdlib.h>

struct call {
    int64_t batch, time, heads, kv_heads, dim;
    int64_t step;                                 /* every step-th token has a query: a divisor of time */
    const real *projected;                        /* [batch, time, heads + 2 kv_heads, dim] */
    const real *gain;                             /* [heads + kv_heads, dim]; null: no normalization */
    real *y;                                      /* [batch, time / step, heads, dim] */
    int64_t threads;
    int64_t slots, new_slots, persistent, window; /* window 0: all */
    const real *cos, *sin;                        /* [batch or 1, time, dim]; null: no rotation */
    int64_t table_batch, table_time;
    const real *keys, *values;                    /* [batch, slots, kv_heads, dim] */
    int64_t keys_batch, keys_slot, values_batch, values_slot;
    const int64_t *cached;                        /* [batch]: the last slots hold that many tokens, the first none */
    const real *persistent_keys, *persistent_values;
    int64_t persistent_batch, persistent_token;   /* of keys and values alike */
    real *new_keys, *new_values;                  /* [batch, new_slots, kv_heads, dim] */
    double eps;
};

/* x / rms(x) gain, or x: padded */
INLINE void normalize(const struct call *c, int64_t head, const real *x, real *y) {
    int dim = (int)c->dim;
    vec squares = {};
    for (int i = 0; i < dim; i += WIDTH) {
        vec part = load_partial(x + i, dim - i);
        squares += part * part;
        store_vec(y + i, part);
    }
    if (!c->gain)
        return;
    vec inverse = all((real)(1 / sqrt((double)sum(squares) / dim + c->eps)));
    for (int i = 0; i < dim; i += WIDTH)
        store_vec(y + i, load_vec(y + i) * inverse * load_partial(c->gain + head * dim + i, dim - i));
}

INLINE void rotate(const struct call *c, int64_t row, int64_t t, const real *x, real *y) {
    int dim = (int)c->dim, half = dim / 2;
    store_vec(y + padded(dim) - WIDTH, (vec){});
    if (!c->cos) {
        memcpy(y, x, dim * sizeof(real));
        return;
    }
    const real *cos = c->cos + row * c->table_batch + t * c->table_time;
    const real *sin = c->sin + row * c->table_batch + t * c->table_time;
    for (int i = 0; i < half; i++) {
        y[i] = x[i] * cos[i] + x[i + half] * sin[i];
        y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
    }
}

INLINE void softmax(int n, real *score) {
    vec top = all(score[0]), total = {};
    for (int i = n; i < padded(n); i++)
        score[i] = -INFINITY;
    for (int i = 0; i < n; i += WIDTH) {
        vec x = load_vec(score + i);
        top = pick(x > top, x, top);
    }
    real maximum = score[0];
    for (int i = 0; i < WIDTH; i++)
        maximum = top[i] > maximum ? top[i] : maximum;
    for (int i = 0; i < n; i += WIDTH) {
        vec e = exponential(load_vec(score + i) - maximum);
        if (n - i < WIDTH)
            e *= inside(n);
        total += e;
        store_vec(score + i, e);
    }
    vec share = all(1 / sum(total));
    for (int i = 0; i < n; i += WIDTH)
        store_vec(score + i, load_vec(score + i) * share);
}

/* The cached tokens in the next cache, earlier by the number of new tokens; empty slots are zero. */
static void shift_cache(const struct call *c, int64_t row, const real *from, int64_t slot_step, real *to) {
    int64_t step = c->kv_heads * c->dim, left = c->new_slots - c->time;
    if (left <= 0)
        return;
    int64_t kept = c->cached[row] < left ? c->cached[row] : left;
    to += row * c->new_slots * step;
    memset(to, 0, (left - kept) * step * sizeof(real));
    to += (left - kept) * step;
    from += (c->slots - kept) * slot_step;
    if (slot_step == step)
        memcpy(to, from, kept * step * sizeof(real));
    else
        for (int64_t slot = 0; slot < kept; slot++)
            memcpy(to + slot * step, from + slot * slot_step, step * sizeof(real));
}

/* A new token's key or value, after them. */
INLINE void append(const struct call *c, int64_t row, int64_t head, int64_t t, const real *token, real *to) {
    int64_t slot = c->new_slots - c->time + t;
    if (slot >= 0)
        memcpy(to + ((row * c->new_slots + slot) * c->kv_heads + head) * c->dim, token, c->dim * sizeof(real));
}

static void attend(const struct call *c, int64_t row, int64_t head, real *scratch) {
    int dim = (int)c->dim, ld = padded(dim), time = (int)c->time, group = (int)(c->heads / c->kv_heads);
    int64_t all_heads = c->heads + 2 * c->kv_heads;
    const real *projected = c->projected + row * time * all_heads * dim;
    real *keys = scratch, *plain = keys + (size_t)time * ld, *query = plain + ld, *out = query + ld, *score = out + ld;
    const real *values = projected + (c->heads + c->kv_heads + head) * dim;
    for (int t = 0; t < time; t++) {
        normalize(c, c->heads + head, projected + (t * all_heads + c->heads + head) * dim, plain);
        rotate(c, row, t, plain, keys + t * ld);
        append(c, row, head, t, keys + t * ld, c->new_keys);
        append(c, row, head, t, values + t * all_heads * dim, c->new_values);
    }
    const real *old_keys = c->keys + row * c->keys_batch + head * dim;
    const real *old_values = c->values + row * c->values_batch + head * dim;
    const real *first_keys = c->persistent_keys + row * c->persistent_batch + head * dim;
    const real *first_values = c->persistent_values + row * c->persistent_batch + head * dim;
    int first = (int)c->persistent;
    vec scale = all((real)(1 / sqrt((double)dim)));
    for (int i = 0; i < group * (time / (int)c->step); i++) {
        int index = i / group, t = (index + 1) * (int)c->step - 1;
        int64_t q_head = head * group + i % group;
        normalize(c, q_head, projected + (t * all_heads + q_head) * dim, plain);
        for (int j = 0; j < dim; j += WIDTH)
            store_vec(plain + j, load_vec(plain + j) * scale);
        rotate(c, row, t, plain, query);
        /* how many tokens before the new ones are in sight, and from which new one on */
        int64_t back = c->window ? c->window - 1 : INT64_MAX;
        int old = (int)(back - t < c->cached[row] ? (back > t ? back - t : 0) : c->cached[row]);
        int from = (int)(t > back ? t - back : 0), fresh = t + 1 - from;
        int64_t slot = c->slots - old;
        /* each part ends in a register of its own: a part may write behind its end what the next one then writes over */
        apply(first, dim, first_keys, c->persistent_token, plain, score);
        apply(old, dim, old_keys + slot * c->keys_slot, c->keys_slot, query, score + first);
        apply(fresh, dim, keys + from * ld, ld, query, score + first + old);
        softmax(first + old + fresh, score);
        apply_reversed(first, dim, first_values, c->persistent_token, score, out, 0);
        apply_reversed(old, dim, old_values + slot * c->values_slot, c->values_slot, score + first, out, 1);
        apply_reversed(fresh, dim, values + from * all_heads * dim, all_heads * dim, score + first + old, out, 1);
        memcpy(c->y + ((row * (time / c->step) + index) * c->heads + q_head) * dim, out, dim * sizeof(real));
    }
}

struct job {
    const struct call *call;
    real *scratch;
    size_t numbers; /* of one thread */
};

/* Rows and heads first, then the caches of keys and values: no part reads what another writes. */
static void run_part(const void *context, int64_t i, int worker) {
    const struct job *job = context;
    const struct call *c = job->call;
    int64_t attending = c->batch * c->kv_heads;
    if (i < attending) {
        attend(c, i / c->kv_heads, i % c->kv_heads, job->scratch + worker * job->numbers);
        return;
    }
    int64_t row = (i - attending) / 2;
    if ((i - attending) % 2)
        shift_cache(c, row, c->values + row * c->values_batch, c->values_slot, c->new_values);
    else
        shift_cache(c, row, c->keys + row * c->keys_batch, c->keys_slot, c->new_keys);
}

int cached_attention(const struct call *c) {
    size_t ld = padded((int)c->dim);
    struct job job = {.call = c, .numbers = (c->time + 3) * ld + c->persistent + c->slots + c->time + 2 * WIDTH};
    job.numbers = (job.numbers + LINE - 1) / LINE * LINE;
    job.scratch = aligned_alloc(64, c->threads * job.numbers * sizeof(real));
    if (!job.scratch)
        return 1;
    share_out(c->threads, c->batch * (c->kv_heads + 2), run_part, &job);
    free(job.scratch);
    return 0;
}
