/* Decays for each channel: every column of a layer's matrix (a row of its state) has a gate of its own.

   The decay matrices then have a retention of 0, so that C is H and m is E. A, m and what stands for C_ts a_s are

       A_t = keep_t A_{t-1}    m_t = keep_t m_{t-1} + E_t    P_ts = keep_t P_{t-1,s} + H_ts a_s

   with one number for each column. Again, everything is a product or a sum. */

#pragma once

#include "chunk.h"
#include "cpu_runtime/matvec.h"

/* A and m of layer l in what is read at token t */
INLINE const real *kept_at(const network *net, const work *w, int l, int t) {
    return w->kept[l] + (size_t)(net->read == BEFORE ? t : t + 1) * net->rows[l];
}

INLINE const real *moved_at(const network *net, const work *w, int l, int t) {
    return w->moved[l] + (size_t)(net->read == BEFORE ? t : t + 1) * net->rows[l];
}

/* P_ts */
INLINE real *decayed_at(const network *net, const work *w, int l, int n, int t, int s) {
    return w->decayed[l] + ((size_t)t * (n + net->past) + s) * net->rows[l];
}

static void decay_columns(const network *net, work *w, int n) {
    for (int l = 0; l < net->layers; l++) {
        int rows = net->rows[l];
        real *kept = w->kept[l], *moved = w->moved[l];
        for (int i = 0; i < rows; i++) {
            kept[i] = 1;
            moved[i] = 0;
        }
        for (int t = 0; t < n; t++, kept += rows, moved += rows)
            for (int i = 0; i < rows; i += WIDTH) {
                vec keep = load_vec(w->keep[l] + (size_t)t * rows + i);
                store_vec(kept + rows + i, load_vec(kept + i) * keep);
                store_vec(moved + rows + i, load_vec(moved + i) * keep + w->decay.m[t]);
            }
    }
}

/* P, once the inputs of the layers are known */
static void decay_inputs(const network *net, work *w, int n) {
    for (int l = 0; net->channels && l < net->layers; l++) {
        int rows = net->rows[l];
        for (int t = 0; t < n; t++) {
            const real *keep = w->keep[l] + (size_t)t * rows, *h = w->decay.C + (size_t)t * net->ld;
            for (int s = 0; s <= t + net->past; s++) {
                const real *a = w->input[l] + (size_t)s * rows;
                const real *before = t && s < t + net->past ? decayed_at(net, w, l, n, t - 1, s) : NULL;
                real *to = decayed_at(net, w, l, n, t, s);
                for (int i = 0; i < rows; i += WIDTH)
                    store_vec(to + i, load_vec(a + i) * h[s] +
                                          (before ? load_vec(before + i) * load_vec(keep + i) : (vec){}));
            }
        }
    }
}

/* x_t P_ts in row t of `scores`, [n, ld] */
static void score_columns(const network *net, work *w, int n, int l, const real *x) {
    int rows = net->rows[l], delay = net->read == BEFORE;
    memset(w->scores, 0, (size_t)n * net->ld * sizeof(real));
    for (int t = delay; t < n; t++)
        for (int s = 0; s <= t - delay + net->past; s += WIDTH) {
            vec total[WIDTH] = {};
            int count = min(WIDTH, t - delay + net->past + 1 - s);
            for (int j = 0; j < count; j++) {
                const real *p = decayed_at(net, w, l, n, t - delay, s + j);
                for (int i = 0; i < rows; i += WIDTH)
                    total[j] += load_vec(x + (size_t)t * rows + i) * load_vec(p + i);
            }
            store_vec(w->scores + (size_t)t * net->ld + s, sums(total));
        }
}

/* From the gradients of A, m, the scores (negated, in `grad_scores`) and P after the last token to those of the queries
   x, the inputs, H, E and the gates of layer l; x: null, if nothing was read. Adds to all but the gates'. */
static void columns_backward(const network *net, work *w, int n, int l, const real *x, real *grad_x) {
    int rows = net->rows[l], ld = net->ld, delay = net->read == BEFORE, past = net->past;
    real *grad_p = w->grad_decayed[l], *grad_keep = w->grad_keep[l];
    memset(grad_keep, 0, (size_t)n * rows * sizeof(real));
    for (int t = n - 1; t >= 0; t--) {
        const real *keep = w->keep[l] + (size_t)t * rows, *h = w->decay.C + (size_t)t * ld;
        int reader = t + delay, reads = x && reader < n;
        const real *xt = x + (size_t)reader * rows, *grad_score = w->grad_scores + (size_t)reader * ld;
        for (int s = 0; s <= t + past; s++) {
            const real *a = w->input[l] + (size_t)s * rows, *p = decayed_at(net, w, l, n, t, s);
            const real *before = t && s < t + past ? decayed_at(net, w, l, n, t - 1, s) : NULL;
            real *gp = grad_p + (size_t)s * rows, *ga = w->grad_input[l] + (size_t)s * rows;
            real g = reads ? -grad_score[s] : 0;
            vec along = {};
            for (int i = 0; i < rows; i += WIDTH) {
                vec gi = load_vec(gp + i);
                if (reads) {
                    gi += load_vec(xt + i) * g;
                    real *to = grad_x + (size_t)reader * rows + i;
                    store_vec(to, load_vec(to) + load_vec(p + i) * g);
                }
                along += gi * load_vec(a + i);
                store_vec(ga + i, load_vec(ga + i) + gi * h[s]);
                if (before) {
                    store_vec(grad_keep + (size_t)t * rows + i,
                              load_vec(grad_keep + (size_t)t * rows + i) + gi * load_vec(before + i));
                    gi *= load_vec(keep + i);
                }
                store_vec(gp + i, gi);
            }
            w->decay_grad.C[(size_t)t * ld + s] += sum(along);
        }
    }
    for (int i = 0; i < rows; i += WIDTH) {
        vec of_kept = {}, of_moved = {};
        for (int t = n - 1; t >= 0; t--) {
            size_t at = (size_t)t * rows + i;
            of_kept += load_vec(w->grad_kept[l] + at + rows);
            of_moved += load_vec(w->grad_moved[l] + at + rows);
            store_vec(grad_keep + at, load_vec(grad_keep + at) + of_kept * load_vec(w->kept[l] + at) +
                                          of_moved * load_vec(w->moved[l] + at));
            w->decay_grad.m[t] += sum(of_moved);
            of_kept *= load_vec(w->keep[l] + at);
            of_moved *= load_vec(w->keep[l] + at);
        }
    }
    for (int i = 0; i < n * rows; i++)
        grad_keep[i] = -grad_keep[i];
}
