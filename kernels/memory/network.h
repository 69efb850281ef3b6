/* One head's memory network over one chunk: the state after it, its reads, and the derivatives of both. */

#pragma once

#include "coefficients.h"
#include "gradients.h"

/* -- write ---------------------------------------------------------------------------------------------------------- */

/* The errors times their coefficients in the weights (and momentum) at the end: [m, width] each. */
static void weighted_errors(const network *net, work *w, const chunk *c, int m, int l) {
    int width = net->width[l];
    for (int s = 0; s < m; s++)
        for (int i = 0; i < width; i += WIDTH) {
            vec d = load_vec(c->error[l] + s * width + i);
            store_vec(w->weighted + s * width + i, d * w->last[s]);
            if (net->parts == 2)
                store_vec(w->weighted_momentum + s * width + i, d * w->last_momentum[s]);
        }
}

/* The state after the chunk, in `to`, which may be where the state before it is. */
static void write_chunk(const network *net, work *w, const chunk *c, int n, real *const *to) {
    real A = w->decay.A[n - 1], E = w->decay.E[n - 1], m = w->decay.m[n - 1];
    int writes = n + net->past;
    for (int l = 0; l < net->layers; l++) {
        int width = net->width[l], size = net->rows[l] * width;
        const real *from = c->state[l], *input = w->input[l];
        if (net->channels)
            input = decayed_at(net, w, l, n, n - 1, 0);
        for (int row = 0; row < net->rows[l]; row++) {
            if (net->channels) {
                A = w->kept[l][(size_t)n * net->rows[l] + row];
                m = w->moved[l][(size_t)n * net->rows[l] + row];
            }
            if (net->parts == 2)
                for (int i = row * width; i < (row + 1) * width; i += WIDTH) {
                    vec weight = load_vec(from + i), momentum = load_vec(from + size + i);
                    store_vec(to[l] + i, weight * A + momentum * m);
                    store_vec(to[l] + size + i, momentum * E);
                }
            else
                for (int i = row * width; i < (row + 1) * width; i += WIDTH)
                    store_vec(to[l] + i, load_vec(from + i) * A);
        }
        weighted_errors(net, w, c, writes, l);
        multiply_transposed(net->in[l], width, writes, input, net->rows[l], w->weighted, width, to[l], width, SUBTRACT);
        if (net->parts == 2)
            multiply_transposed(net->in[l], width, writes, w->input[l], net->rows[l], w->weighted_momentum, width,
                                to[l] + size, width, SUBTRACT);
    }
}

/* -- read ----------------------------------------------------------------------------------------------------------- */

/* [A x | m x]: the coefficients of the state at the start, multiplied into the layer's input */
static void carry(const network *net, const work *w, int parts, int n, int l, const real *x, real *carried) {
    int rows = net->rows[l];
    for (int t = 0; t < n; t++) {
        real *to = carried + (size_t)t * parts * rows;
        const real *A = net->channels ? kept_at(net, w, l, t) : NULL, *m = net->channels ? moved_at(net, w, l, t) : NULL;
        for (int i = 0; i < rows; i += WIDTH) {
            vec xi = load_vec(x + t * rows + i);
            store_vec(to + i, xi * (A ? load_vec(A + i) : all(w->carry[t])));
            if (parts == 2)
                store_vec(to + rows + i, xi * (m ? load_vec(m + i) : all(w->carry_momentum[t])));
        }
    }
}

/* The writes of a chunk of n that the block of tokens from t on reads: its own and earlier ones */
INLINE int seen_by(const network *net, int t, int n) { return net->past ? n + net->past : min(t + BLOCK, n); }

/* The products of queries x with the inputs of layer l, in `scores`. Causal: a block of tokens reads what it and earlier
   blocks wrote. */
static void score(const network *net, work *w, int n, int l, const real *x) {
    int rows = net->rows[l], ld = net->ld;
    if (net->channels) {
        score_columns(net, w, n, l, x);
        return;
    }
    transpose(n + net->past, net->in[l], w->input[l], rows, w->columns, ld);
    for (int t = 0; t < n; t += BLOCK)
        multiply(min(n - t, BLOCK), padded(seen_by(net, t, n)), net->in[l], x + t * rows, rows, w->columns, ld,
                 w->scores + t * ld, ld, SET);
}

/* All queries, each at the weights that it reads: the layers' outputs in `query_z`. */
static void read_chunk(const network *net, work *w, const chunk *c, int n, const anchor *anchor,
                       real *const *query_z) {
    int ld = net->ld;
    const real *x = w->queries;
    for (int l = 0; l < net->layers; l++) {
        int rows = net->rows[l], width = net->width[l], stacked = c->parts * rows;
        if (l) {
            activate_layer(net, l - 1, n, query_z[l - 1], w->x, NULL, NULL);
            x = w->x;
        }
        if (net->read == ANCHOR) {
            multiply(n, width, net->in[l], x, rows, anchor->weights[l], width, query_z[l], width, SET);
            continue;
        }
        carry(net, w, c->parts, n, l, x, w->carried);
        multiply(n, width, stacked, w->carried, stacked, c->state[l], width, query_z[l], width, SET);
        score(net, w, n, l, x);
        for (int t = 0; t < n; t += BLOCK) {
            int count = min(n - t, BLOCK), seen = seen_by(net, t, n);
            real *scores = w->scores + t * ld;
            const real *weights = w->read + t * ld;
            for (int r = 0; r < count; r++)
                for (int s = 0; s < padded(seen); s += WIDTH)
                    store_vec(scores + r * ld + s, load_vec(scores + r * ld + s) * load_vec(weights + r * ld + s));
            multiply(count, width, seen, scores, ld, c->error[l], width, query_z[l] + t * width, width, SUBTRACT);
        }
    }
}

/* y, [n, last width], from the last layer's output; may write over it */
static void read_output(const network *net, work *w, int n, const real *z, real *y) {
    int top = net->layers - 1, width = net->width[top];
    for (int t = 0; t < n; t++, z += width, y += width)
        if (net->normed)
            norm_read(net->out[top], w->queries + t * width, net->gain, z, w->x, y);
        else
            memmove(y, z, width * sizeof(real));
}

/* -- backward ------------------------------------------------------------------------------------------------------- */

/* Through `write_chunk`. `grad_state` is of the state at the end and becomes that of the state at the start; sets the
   gradients of inputs and errors, and of the tokens' coefficients at the end. */
static void write_chunk_backward(const network *net, work *w, const chunk *c, int n) {
    real A = w->decay.A[n - 1], E = w->decay.E[n - 1], m = w->decay.m[n - 1];
    double grad_A = 0, grad_m = 0, grad_E = 0;
    n += net->past;
    memset(w->grad_last, 0, net->ld * sizeof(real));
    memset(w->grad_last_momentum, 0, net->ld * sizeof(real));
    for (int l = 0; l < net->layers; l++) {
        int rows = net->rows[l], width = net->width[l], size = rows * width, two = net->parts == 2;
        real *grad = w->grad_state[l], *grad_weighted = w->g, *grad_weighted_momentum = w->back;
        const real *from = c->state[l], *input = w->input[l];
        if (net->channels)
            input = decayed_at(net, w, l, n - net->past, n - net->past - 1, 0);
        multiply(n, width, net->in[l], input, rows, grad, width, grad_weighted, width, SET);
        if (two)
            multiply(n, width, net->in[l], w->input[l], rows, grad + size, width, grad_weighted_momentum, width, SET);
        for (int s = 0; s < n; s++) {
            vec along = {}, along_momentum = {};
            real last = w->last[s], last_momentum = w->last_momentum[s];
            for (int i = s * width; i < (s + 1) * width; i += WIDTH) {
                vec d = load_vec(c->error[l] + i), f = load_vec(grad_weighted + i), grad_d = f * -last;
                along += d * f;
                store_vec(w->weighted + i, d * last);
                if (two) {
                    vec fm = load_vec(grad_weighted_momentum + i);
                    along_momentum += d * fm;
                    grad_d -= fm * last_momentum;
                    store_vec(w->weighted_momentum + i, d * last_momentum);
                }
                store_vec(w->grad_error[l] + i, grad_d);
            }
            w->grad_last[s] -= sum(along);
            w->grad_last_momentum[s] -= sum(along_momentum);
        }
        int ldr = net->parts * rows;
        transpose(net->parts * rows, net->out[l], grad, width, w->grad_transposed[l], ldr);
        memset(w->grad_input[l], 0, (size_t)n * rows * sizeof(real));
        multiply(n, rows, net->out[l], w->weighted, width, w->grad_transposed[l], ldr,
                 net->channels ? w->grad_decayed[l] : w->grad_input[l], rows, SUBTRACT);
        if (two)
            multiply(n, rows, net->out[l], w->weighted_momentum, width, w->grad_transposed[l] + rows, ldr,
                     w->grad_input[l], rows, SUBTRACT);
        for (int row = 0; row < size; row += width) { /* sums that cancel: short ones, added up in double */
            vec sum_A = {}, sum_m = {}, sum_E = {};
            size_t last = (size_t)(n - net->past) * rows + row / width; /* of A and m of the column */
            if (net->channels) {
                A = w->kept[l][last];
                m = w->moved[l][last];
            }
            for (int i = row; i < row + width; i += WIDTH) {
                vec g = load_vec(grad + i);
                sum_A += g * load_vec(from + i);
                if (two) {
                    vec gm = load_vec(grad + size + i), momentum = load_vec(from + size + i);
                    sum_m += g * momentum;
                    sum_E += gm * momentum;
                    store_vec(grad + size + i, g * m + gm * E);
                }
                store_vec(grad + i, g * A);
            }
            if (net->channels) {
                w->grad_kept[l][last] = sum(sum_A);
                w->grad_moved[l][last] = sum(sum_m);
            } else {
                grad_A += sum(sum_A);
                grad_m += sum(sum_m);
            }
            grad_E += sum(sum_E);
        }
    }
    n -= net->past;
    w->grad_carry[n] = (real)grad_A;
    w->grad_carry_momentum[n] = (real)grad_m;
    w->decay_grad.E = (real)grad_E;
}

/* The same where the state at the end has no gradient. */
static void unread_chunk_backward(const network *net, work *w, int n) {
    for (int l = 0; l < net->layers; l++) {
        memset(w->grad_error[l], 0, (size_t)(n + net->past) * net->width[l] * sizeof(real));
        memset(w->grad_input[l], 0, (size_t)(n + net->past) * net->rows[l] * sizeof(real));
    }
    memset(w->grad_last, 0, net->ld * sizeof(real));
    memset(w->grad_last_momentum, 0, net->ld * sizeof(real));
    w->grad_carry[n] = w->grad_carry_momentum[n] = w->decay_grad.E = 0;
}

/* Through `read_chunk` and `read_output`, from the gradient of y in `g`; adds to the gradients of state, anchor, inputs
   and errors, sets those of the queries and of the reads' coefficients. */
static void read_chunk_backward(const network *net, work *w, const chunk *c, int n, const anchor *anchor,
                                real *const *grad_anchor, real *const *query_z) {
    int ld = net->ld, top = net->layers - 1;
    real *g = w->g;
    memset(w->grad_read, 0, (size_t)n * ld * sizeof(real));
    memset(w->grad_carry, 0, n * sizeof(real));
    memset(w->grad_carry_momentum, 0, n * sizeof(real));
    if (net->normed) {
        int width = net->width[top];
        memcpy(w->grad_queries, g, (size_t)n * width * sizeof(real));
        for (int i = 0; i < n * width; i += width)
            norm_read_backward(net->out[top], net->gain, query_z[top] + i, w->x, g + i, w->grad_gain);
    } else
        memset(w->grad_queries, 0, (size_t)n * net->rows[0] * sizeof(real));
    for (int l = top; l >= 0; l--) {
        int rows = net->rows[l], width = net->width[l], stacked = c->parts * rows;
        const real *x = w->queries;
        if (l) {
            activate_layer(net, l - 1, n, query_z[l - 1], w->x, w->x_slope, NULL);
            x = w->x;
        }
        real *grad_x = l ? w->g : w->grad_queries; /* from the state's share on, g is not needed */
        if (net->read == ANCHOR) {
            multiply_transposed(net->in[l], width, n, x, rows, g, width, grad_anchor[l], width, ADD);
            real *back = w->carried;
            multiply(n, rows, net->out[l], g, width, anchor->transposed[l], anchor->ld[l], back, rows, SET);
            if (l)
                through_slope(net, l - 1, n, back, w->x_slope, NULL, g);
            else
                for (int i = 0; i < n * rows; i += WIDTH)
                    store_vec(grad_x + i, load_vec(grad_x + i) + load_vec(back + i));
            if (net->channels)
                columns_backward(net, w, n, l, NULL, NULL);
            continue;
        }
        /* the state's share */
        carry(net, w, c->parts, n, l, x, w->carried);
        multiply_transposed(stacked, width, n, w->carried, stacked, g, width, w->grad_state[l], width, ADD);
        real *back = w->carried;
        multiply(n, stacked, net->out[l], g, width, w->transposed[l], stacked, back, stacked, SET);
        /* the share of the chunk's own tokens */
        int writes = n + net->past;
        score(net, w, n, l, x);
        transpose(writes, net->out[l], c->error[l], width, w->columns, ld);
        for (int t = 0; t < n; t += BLOCK) {
            int count = min(n - t, BLOCK), seen = seen_by(net, t, n);
            multiply(count, padded(seen), net->out[l], g + t * width, width, w->columns, ld, w->grad_scores + t * ld, ld,
                     SET);
            for (int r = t; r < t + count; r++)
                for (int s = r * ld; s < r * ld + padded(seen); s += WIDTH) {
                    vec score = load_vec(w->scores + s), grad = load_vec(w->grad_scores + s),
                        read = load_vec(w->read + s);
                    store_vec(w->grad_read + s, load_vec(w->grad_read + s) - grad * score);
                    store_vec(w->weighted_scores + s, score * read);
                    store_vec(w->grad_scores + s, grad * read); /* negated where it is used */
                }
        }
        for (int s = 0; s < writes; s += BLOCK) { /* a block was read by itself and later blocks, from t on */
            int count = min(writes - s, BLOCK), t = net->past ? 0 : s;
            multiply_transposed(count, width, n - t, w->weighted_scores + t * ld + s, ld, g + t * width, width,
                                w->grad_error[l] + s * width, width, SUBTRACT);
            if (!net->channels)
                multiply_transposed(count, rows, n - t, w->grad_scores + t * ld + s, ld, x + t * rows, rows,
                                    w->grad_input[l] + s * rows, rows, SUBTRACT);
        }
        for (int t = 0; t < n; t++) {
            vec along = {}, along_momentum = {};
            const real *from = back + (size_t)t * stacked;
            const real *A = net->channels ? kept_at(net, w, l, t) : NULL, *m = NULL;
            real *grad_A = NULL, *grad_m = NULL;
            if (net->channels) {
                m = moved_at(net, w, l, t);
                grad_A = w->grad_kept[l] + (A - w->kept[l]);
                grad_m = w->grad_moved[l] + (m - w->moved[l]);
            }
            for (int i = 0; i < rows; i += WIDTH) {
                vec xi = load_vec(x + t * rows + i), b = load_vec(from + i);
                vec total = b * (A ? load_vec(A + i) : all(w->carry[t]));
                if (A)
                    store_vec(grad_A + i, load_vec(grad_A + i) + xi * b);
                else
                    along += xi * b;
                if (c->parts == 2) {
                    vec bm = load_vec(from + rows + i);
                    total += bm * (A ? load_vec(m + i) : all(w->carry_momentum[t]));
                    if (A)
                        store_vec(grad_m + i, load_vec(grad_m + i) + xi * bm);
                    else
                        along_momentum += xi * bm;
                }
                store_vec(grad_x + t * rows + i, l ? total : load_vec(grad_x + t * rows + i) + total);
            }
            w->grad_carry[t] += sum(along);
            w->grad_carry_momentum[t] += sum(along_momentum);
        }
        if (net->channels)
            columns_backward(net, w, n, l, x, grad_x);
        for (int t = 0; t < n && !net->channels; t += BLOCK)
            multiply(min(n - t, BLOCK), rows, seen_by(net, t, n), w->grad_scores + t * ld, ld, w->input[l], rows,
                     grad_x + t * rows, rows, SUBTRACT);
        if (l)
            through_slope(net, l - 1, n, g, w->x_slope, NULL, g);
    }
}
