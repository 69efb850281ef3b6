/* Tensors as they come, in whatever strides, to and from rows and matrices that are padded to whole vectors. */

#pragma once

#include "matrix.h"

/* [batch, time, heads, width] or, of gates, [batch, time, heads]; the last dimension is dense */
typedef struct {
    real *data;
    int64_t batch, time, head;
} tokens;

/* [batch, heads, out, in], the last two dense */
typedef struct {
    real *data;
    int64_t batch, head;
} matrices;

/* Some of a row's tokens: `n` from the `first` on, of those that `order` lists; null: of all. */
typedef struct {
    int64_t row, head;
    const int32_t *order;
    int first, n;
} piece;

INLINE real *token(const tokens *x, const piece *p, int i) {
    int64_t t = p->order ? p->order[p->first + i] : p->first + i;
    return x->data + p->row * x->batch + t * x->time + p->head * x->head;
}

static inline void load(const tokens *x, const piece *p, int width, real *to) {
    int ld = padded(width);
    for (int i = 0; i < p->n; i++) {
        memcpy(to + i * ld, token(x, p, i), width * sizeof(real));
        if (ld > width)
            memset(to + i * ld + width, 0, (ld - width) * sizeof(real));
    }
}

static inline void store(const tokens *x, const piece *p, int width, const real *from) {
    for (int i = 0; i < p->n; i++)
        memcpy(token(x, p, i), from + (size_t)i * padded(width), width * sizeof(real));
}

static inline void load_gate(const tokens *x, const piece *p, real *to, real missing) {
    for (int i = 0; i < p->n; i++)
        to[i] = x->data ? *token(x, p, i) : missing;
}

static inline void store_gate(const tokens *x, const piece *p, const real *from) {
    if (x->data)
        for (int i = 0; i < p->n; i++)
            *token(x, p, i) = from[i];
}

/* [out, in] -> [in, out], rows of both padded with zeros; rows of the result are ld numbers apart */
static inline void load_matrix(int in, int out, const matrices *x, int64_t row, int64_t head, real *to, int ld) {
    int width = padded(out);
    const real *from = x->data + row * x->batch + head * x->head;
    if (in % WIDTH == 0) {
        transpose(out, in, from, in, to, ld);
        return;
    }
    for (int i = 0; i < padded(in); i++)
        for (int o = 0; o < width; o++)
            to[i * ld + o] = o < out && i < in ? from[o * in + i] : 0;
}

/* and back */
static inline void store_matrix(int in, int out, const matrices *x, int64_t row, int64_t head, const real *from,
                                int ld) {
    real *to = x->data + row * x->batch + head * x->head;
    if (in % WIDTH == 0 && out % WIDTH == 0) {
        transpose(in, out, from, ld, to, in);
        return;
    }
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i++)
            to[o * in + i] = from[i * ld + o];
}
