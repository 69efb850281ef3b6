/* How much of every past write is left: the gates of a chunk as the matrices its products need.

   With keep = 1 - alpha, a chunk of n tokens has
       A_t = keep_t A_{t-1}      E_t = eta_t E_{t-1}      m_t = keep_t m_{t-1} + E_t
       H_tt = C_tt = 1           H_ts = eta_t H_{t-1,s}   C_ts = keep_t C_{t-1,s} + H_ts        (s < t)
   the weights after token t being  A_t W + m_t S - sum_s C_ts step_s d_s a_s^T  and the momentum after the last
   E S - sum_s H_s step_s d_s a_s^T.  Everything is a product or a sum, no quotient and no logarithm: a gate of exactly
   0 or 1 is exact, and so is the gradient at it. Without momentum H is the identity and m, E are zero. */

#pragma once

#include "cpu_runtime/vector.h"

typedef struct {
    int n, ld, momentum;
    real *keep, *eta;     /* [n] */
    real *A, *E, *m;      /* [n] */
    real *C, *H;          /* [n, ld], zero above the diagonal */
} decay;

typedef struct {
    real *A, *m;          /* [n] */
    real *C;              /* [n, ld]; what is above the diagonal counts for nothing */
    real *H;              /* [ld]: of H's last row */
    real E;               /* of E's last number */
    real *row, *before;   /* [ld], work */
} decay_grad;

INLINE void decay_matrices(decay *x) {
    real A = 1, E = x->momentum, m = 0;
    for (int t = 0; t < x->n; t++) {
        real keep = x->keep[t], eta = x->eta[t];
        x->A[t] = A *= keep;
        x->E[t] = E *= eta;
        x->m[t] = m = keep * m + E;
        real *c = x->C + t * x->ld, *h = x->H + t * x->ld;
        for (int s = 0; s < x->ld; s += WIDTH) {
            vec lasting = t ? get(h - x->ld + s) * eta : (vec){};
            vec left = t ? get(c - x->ld + s) * keep : (vec){};
            put(h + s, lasting);
            put(c + s, left + lasting);
        }
        h[t] = c[t] = 1;
    }
}

/* From the gradients of the matrices to those of the gates; uses up g. */
INLINE void decay_backward(const decay *x, decay_grad *g, real *grad_alpha, real *grad_eta) {
    int n = x->n, ld = x->ld;
    real grad_A = 0, grad_m = 0, grad_E = g->E;
    real *grad_h = g->row;
    memset(grad_h, 0, ld * sizeof(real));
    for (int t = n - 1; t >= 0; t--) {
        real keep = x->keep[t], eta = x->eta[t];
        grad_A += g->A[t];
        grad_m += g->m[t];
        grad_E += grad_m;
        real *grad_c = g->C + t * ld;
        /* of H_ts: what C_ts takes from it, and what the rows after it do */
        for (int s = 0; s < ld; s += WIDTH)
            put(grad_h + s, get(grad_h + s) + get(grad_c + s) + (t == n - 1 ? get(g->H + s) : (vec){}));
        real to_keep = grad_A * (t ? x->A[t - 1] : 1) + grad_m * (t ? x->m[t - 1] : 0);
        real to_eta = grad_E * (t ? x->E[t - 1] : x->momentum);
        if (t) {
            const real *c = x->C + (t - 1) * ld, *h = x->H + (t - 1) * ld;
            vec along_c = {}, along_h = {};
            for (int s = 0; s < t; s += WIDTH) { /* c and h are zero from t on */
                vec gc = get(grad_c + s), gh = get(grad_h + s), there = s + WIDTH > t ? inside(t) : all(1);
                along_c += gc * get(c + s) * there;
                along_h += gh * get(h + s) * there;
                put(grad_c - ld + s, get(grad_c - ld + s) + gc * keep);
                put(grad_h + s, gh * eta * there);
            }
            to_keep += sum(along_c);
            to_eta += sum(along_h);
        }
        for (int s = t; s < ld; s++)
            grad_h[s] = 0;
        grad_alpha[t] = -to_keep;
        grad_eta[t] = x->momentum ? to_eta : 0;
        grad_A *= keep;
        grad_m *= keep;
        grad_E *= eta;
    }
}
