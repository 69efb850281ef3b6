/* The gates of a chunk as matrices.

   With retain = 1 - alpha, a chunk of n tokens has
       A_t = retain_t A_{t-1}    E_t = eta_t E_{t-1}      m_t = retain_t m_{t-1} + E_t
       H_tt = C_tt = 1           H_ts = eta_t H_{t-1,s}   C_ts = retain_t C_{t-1,s} + H_ts      (s < t)
   The weights after token t are  A_t W + m_t S - sum_s C_ts step_s d_s a_s^T,  and the momentum after the last token is
   E S - sum_s H_s step_s d_s a_s^T.  Everything is a product or a sum, without quotients or logarithms, so that a gate
   of exactly 0 or 1 is exact, and so is its gradient. Without momentum H is the identity and m, E are zero.

   With a window, a step goes along the gradients of the token and of the `past` writes before it. Columns are then
   writes, of which token t is the t + past; theta_t takes the place of H_tt = C_tt = 1 in all columns of its window. */

#pragma once

#include "cpu_runtime/vector.h"

typedef struct {
    int n, ld, momentum, past;
    real *retain, *eta;     /* [n] */
    const real *theta;      /* [n]; used with a window */
    real *A, *E, *m;      /* [n] */
    real *C, *H;          /* [n, ld], zero after the token's own column */
} decay;

typedef struct {
    real *A, *m;          /* [n] */
    real *C;              /* [n, ld]; entries after the token's own column are ignored */
    real *H;              /* [ld]: of the last row of H */
    real E;               /* of the last E */
    real *row;            /* [ld], work */
} decay_grad;

INLINE void decay_matrices(decay *x) {
    real A = 1, E = x->momentum, m = 0;
    for (int t = 0; t < x->n; t++) {
        real retain = x->retain[t], eta = x->eta[t];
        x->A[t] = A *= retain;
        x->E[t] = E *= eta;
        x->m[t] = m = retain * m + E;
        real *c = x->C + t * x->ld, *h = x->H + t * x->ld;
        for (int s = 0; s < x->ld; s += WIDTH) {
            vec decayed = t ? load_vec(h - x->ld + s) * eta : (vec){};
            vec retained = t ? load_vec(c - x->ld + s) * retain : (vec){};
            store_vec(h + s, decayed);
            store_vec(c + s, retained + decayed);
        }
        if (!x->past)
            h[t] = c[t] = 1;
        for (int s = t; x->past && s <= t + x->past; s++) {
            h[s] += x->theta[t];
            c[s] += x->theta[t];
        }
    }
}

/* From the gradients of the matrices to those of the gates, of theta with a window alone; overwrites g. */
INLINE void decay_backward(const decay *x, decay_grad *g, real *grad_alpha, real *grad_eta, real *grad_theta) {
    int n = x->n, ld = x->ld, past = x->past;
    real grad_A = 0, grad_m = 0, grad_E = g->E;
    real *grad_h = g->row;
    memset(grad_h, 0, ld * sizeof(real));
    for (int t = n - 1; t >= 0; t--) {
        real retain = x->retain[t], eta = x->eta[t];
        grad_A += g->A[t];
        grad_m += g->m[t];
        grad_E += grad_m;
        real *grad_c = g->C + t * ld;
        /* of H_ts: what C_ts takes from it, and what the rows after it do */
        for (int s = 0; s < ld; s += WIDTH)
            store_vec(grad_h + s,
                      load_vec(grad_h + s) + load_vec(grad_c + s) + (t == n - 1 ? load_vec(g->H + s) : (vec){}));
        if (past) {
            grad_theta[t] = 0;
            for (int s = t; s <= t + past; s++)
                grad_theta[t] += grad_h[s];
        }
        real grad_retain = grad_A * (t ? x->A[t - 1] : 1) + grad_m * (t ? x->m[t - 1] : 0);
        real grad_eta_t = grad_E * (t ? x->E[t - 1] : x->momentum);
        if (t) {
            const real *c = x->C + (t - 1) * ld, *h = x->H + (t - 1) * ld;
            vec along_c = {}, along_h = {};
            for (int s = 0; s < t + past; s += WIDTH) { /* c and h are zero from there on */
                vec gc = load_vec(grad_c + s), gh = load_vec(grad_h + s);
                vec valid = s + WIDTH > t + past ? inside(t + past) : all(1);
                along_c += gc * load_vec(c + s) * valid;
                along_h += gh * load_vec(h + s) * valid;
                store_vec(grad_c - ld + s, load_vec(grad_c - ld + s) + gc * retain);
                store_vec(grad_h + s, gh * eta * valid);
            }
            grad_retain += sum(along_c);
            grad_eta_t += sum(along_h);
        }
        for (int s = t ? t + past : 0; s < ld; s++)
            grad_h[s] = 0;
        grad_alpha[t] = -grad_retain;
        grad_eta[t] = x->momentum ? grad_eta_t : 0;
        grad_A *= retain;
        grad_m *= retain;
        grad_E *= eta;
    }
}
