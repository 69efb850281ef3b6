/* How much of the state at a chunk's start, and of the gradient of each write, is in the weights that each token reads
   and in the state after the last one; and the derivatives of that. */

#pragma once

#include "channels.h"

static void chunk_decay(const network *net, work *w, int n) {
    decay *decay = &w->decay;
    decay->n = n;
    decay->ld = net->ld;
    decay->momentum = net->parts == 2;
    decay->past = net->past;
    decay->theta = w->theta;
    for (int t = 0; t < n; t++)
        decay->retain[t] = net->channels ? 0 : 1 - w->alpha[t];
    decay_matrices(decay);
    if (net->channels)
        decay_columns(net, w, n);
}

/* C_ts of a vector of writes; with decays of columns, P has it */
INLINE vec coefficient(const network *net, const decay *decay, int t, int s) {
    return net->channels ? all(1) : load_vec(decay->C + t * decay->ld + s);
}

/* The decay matrices times the steps, once it is known how much the gradient of each write is clipped. */
static void find_coefficients(const network *net, work *w, const chunk *c, int n) {
    const decay *decay = &w->decay;
    int ld = net->ld, delay = net->read == BEFORE;
    const real *size = net->past ? w->gamma : w->theta;
    memset(w->step, 0, ld * sizeof(real));
    for (int s = 0; s < n + net->past; s++)
        w->step[s] = 2 * size[s] * c->scale[s];
    for (int t = 0; t < n; t++) {
        int from = t - delay; /* a read before the token is written sees what its predecessor left */
        w->carry[t] = from < 0 ? 1 : decay->A[from];
        w->carry_momentum[t] = from < 0 ? 0 : decay->m[from];
        for (int s = 0; s < ld; s += WIDTH)
            store_vec(w->read + t * ld + s,
                      from < 0 ? (vec){} : coefficient(net, decay, from, s) * load_vec(w->step + s));
    }
    for (int s = 0; s < ld; s += WIDTH) {
        store_vec(w->last + s, coefficient(net, decay, n - 1, s) * load_vec(w->step + s));
        store_vec(w->last_momentum + s, load_vec(decay->H + (n - 1) * ld + s) * load_vec(w->step + s));
    }
}

/* Before the derivatives of a chunk, which add to these. */
static void begin_backward(const network *net, work *w, int n) {
    decay_grad *g = &w->decay_grad;
    memset(g->A, 0, net->ld * sizeof(real));
    memset(g->m, 0, net->ld * sizeof(real));
    memset(g->C, 0, (size_t)n * net->ld * sizeof(real));
    memset(w->grad_step, 0, net->ld * sizeof(real));
    for (int l = 0; net->channels && l < net->layers; l++) {
        size_t row = net->rows[l] * sizeof(real);
        memset(w->grad_kept[l], 0, (n + 1) * row);
        memset(w->grad_moved[l], 0, (n + 1) * row);
        memset(w->grad_decayed[l], 0, (n + net->past) * row);
    }
}

/* From the gradients of those matrices to the gates', and through the clipping to the errors' and inputs'. */
static void coefficients_backward(const network *net, work *w, const chunk *c, int n) {
    decay *decay = &w->decay;
    decay_grad *g = &w->decay_grad;
    int ld = net->ld, delay = net->read == BEFORE;
    for (int t = delay; t < n; t++) {
        g->A[t - delay] = w->grad_carry[t];
        g->m[t - delay] += w->grad_carry_momentum[t];
        real *to = g->C + (t - delay) * ld;
        const real *from = w->grad_read + t * ld;
        for (int s = 0; s < ld; s += WIDTH) {
            vec grad = load_vec(from + s);
            store_vec(w->grad_step + s, load_vec(w->grad_step + s) + grad * coefficient(net, decay, t - delay, s));
            if (!net->channels)
                store_vec(to + s, grad * load_vec(w->step + s));
        }
    }
    int end = n - 1;
    g->A[end] += w->grad_carry[n]; /* of the state at the start in the state at the end */
    g->m[end] += w->grad_carry_momentum[n];
    for (int s = 0; s < ld; s += WIDTH) {
        vec step = load_vec(w->step + s), last = load_vec(w->grad_last + s),
            momentum = load_vec(w->grad_last_momentum + s);
        vec C = coefficient(net, decay, end, s), H = load_vec(decay->H + end * ld + s);
        store_vec(w->grad_step + s, load_vec(w->grad_step + s) + last * C + momentum * H);
        if (!net->channels)
            store_vec(g->C + end * ld + s, load_vec(g->C + end * ld + s) + last * step);
        store_vec(g->H + s, momentum * step);
    }
    decay_backward(decay, g, w->grad_alpha, w->grad_eta, w->grad_theta);
    const real *size = net->past ? w->gamma : w->theta;
    real *grad_size = net->past ? w->grad_gamma : w->grad_theta;
    for (int s = 0; s < n + net->past; s++)
        grad_size[s] = 2 * c->scale[s] * w->grad_step[s];
    if (net->clip == 0)
        return;
    for (int s = 0; s < n + net->past; s++) {
        if (!(c->scale[s] < 1))
            continue;
        /* d scale / d norm = -scale / norm, and norm^2 is 4 sum |d|^2 |a|^2 */
        real grad_norm = -4 * 2 * size[s] * w->grad_step[s] * c->scale[s];
        for (int l = 0; l < net->layers; l++) {
            const real *a = w->input[l] + s * net->rows[l], *d = c->error[l] + s * net->width[l];
            real *grad_a = w->grad_input[l] + s * net->rows[l], *grad_d = w->grad_error[l] + s * net->width[l];
            real of_a = (real)(length(net->rows[l], a) / c->norm[s]);
            real of_d = (real)(length(net->width[l], d) / c->norm[s]);
            /* in this order, because the square of a quotient may underflow */
            for (int i = 0; i < net->rows[l]; i += WIDTH)
                store_vec(grad_a + i, load_vec(grad_a + i) + load_vec(a + i) * of_d * (of_d * grad_norm));
            for (int i = 0; i < net->width[l]; i += WIDTH)
                store_vec(grad_d + i, load_vec(grad_d + i) + load_vec(d + i) * of_a * (of_a * grad_norm));
        }
    }
}
