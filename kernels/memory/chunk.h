/* One head's memory network over one chunk: what it is made of.

   A layer's state is stored transposed, weights [in, out] and momentum [in, out] below, as one matrix of `parts` blocks
   of rows, so that both are a right factor in forward products; for products backward there is a copy [out, in].
   The error d_l is half the gradient of the loss with respect to z_l, the output of layer l. The factor 2 is in the
   step.

   A gated network W_2 (act(W_1 x) * (W_3 x)) has two layers: the outputs of the first are those of W_1 and W_3 side by
   side, and its activation makes one of two. With a window, a chunk's gradients are those of its own tokens and of the
   `past` writes before them: `writes` counts both. */

#pragma once

#include "cpu_runtime/activation.h"
#include "decay.h"
#include "layer_norm.h"
#include "cpu_runtime/matrix.h"
#include "cpu_runtime/matvec.h"

enum { LAYERS = 16, BLOCK = 16 /* tokens of a triangular product worked on together */ };

/* At which weights a token is read: those before it was written, after it, or at its chunk's start. */
enum reading { BEFORE, AFTER, ANCHOR };

typedef struct {
    int layers, parts, longest; /* parts: 2, or 1 without momentum; longest: most tokens in a chunk */
    int past;                 /* writes before a token that are in its window */
    int gated;
    int channels;             /* decays are of each column of a matrix */
    int normed;               /* the network is residual with LayerNorm */
    enum reading read;
    enum activation activation;
    objective objective;
    real clip;                /* 0: none */
    int in[LAYERS], out[LAYERS];
    int rows[LAYERS];         /* in, padded: rows of a block of the state, and the width of the layer's input */
    int width[LAYERS];        /* out, padded */
    int ld;                   /* past + longest, padded */
    const real *gain;         /* [width of the last layer] */
} network;

/* Scratch is taken from one piece of memory; without `next`, `used` counts how much is needed. */
typedef struct {
    real *next;
    size_t used;
} arena;

static real *take(arena *arena, size_t numbers) {
    size_t line = 64 / sizeof(real);
    real *found = arena->next ? arena->next + arena->used : NULL;
    arena->used += (numbers + line - 1) / line * line;
    return found;
}

INLINE size_t state_numbers(const network *net) {
    size_t total = 0;
    for (int l = 0; l < net->layers; l++)
        total += (size_t)net->parts * net->rows[l] * net->width[l];
    return total;
}

INLINE int outputs(const network *net) { /* of all layers, for one token */
    int total = 0;
    for (int l = 0; l < net->layers; l++)
        total += net->width[l];
    return total;
}

/* A chunk's state and gradients: what is needed to write it and to differentiate through it. Below, n counts the tokens
   of a chunk, and m = past + n its writes. */
typedef struct {
    int parts;             /* of the state at its start that reads depend on: 1 where the momentum is zero */
    real *state[LAYERS];   /* at its start, [parts of the network * rows, width] */
    real *z[LAYERS];       /* outputs of the layers for the keys, [m, width] */
    real *error[LAYERS];   /* d_l, [m, width] */
    real *upstream[LAYERS];  /* d_{l+1} W_{l+1}, before the slope at z_l, [m, rows of layer l + 1] */
    real *scale;           /* [m]: factor that reduces the norm of a write's gradient to `clip`; at most 1 */
    real *norm;            /* [m]: that norm, before the factor */
} chunk;

/* Work on one chunk at a time. */
typedef struct {
    real *keys, *values, *queries;                   /* [m, rows[0]], [m, last width], [n, rows[0]] */
    real *theta, *alpha, *grad_theta, *grad_alpha, *grad_eta; /* [n] */
    real *delta, *gamma, *grad_delta, *grad_gamma;            /* [m] */
    decay decay;
    real *step;            /* [m]: 2 theta_s, or 2 gamma_s with a window, times the factor of clipping */
    real *last;            /* [m]: coefficient of d_s a_s^T in the weights after the last token, subtracted */
    real *last_momentum;   /* [m]: the same in the momentum after the last token */
    real *read;            /* [n, ld]: coefficient of d_s a_s^T in the weights that are read at token t, subtracted */
    real *carry;           /* [n]: coefficient of the weights at the chunk's start in the weights that are read at t */
    real *carry_momentum;  /* [n]: coefficient of the momentum at the chunk's start in them */
    real *input[LAYERS];   /* a_l, the input of layer l for the keys, [m, rows] */
    real *slope[LAYERS], *curvature[LAYERS]; /* first and second derivative of the activation at z_l, [m, width] */
    real *transposed[LAYERS];                          /* state transposed: [out, parts * rows] */
    real *anchor[LAYERS], *anchor_transposed[LAYERS];  /* of a chunk that began in an earlier call */
    real *query_z[LAYERS];                             /* outputs of the layers for the queries, [n, width] */
    /* with decays of columns, of each layer: what is kept; A and m at the start and after each token; P */
    real *keep[LAYERS], *kept[LAYERS], *moved[LAYERS];          /* [n, rows], [1 + n, rows], [1 + n, rows] */
    real *decayed[LAYERS];                                      /* [n, m, rows] */
    real *grad_keep[LAYERS], *grad_kept[LAYERS], *grad_moved[LAYERS];
    real *grad_decayed[LAYERS];                                 /* [m, rows], of P after the last token */
    real *gain;                                        /* of the LayerNorm, [width of the last layer], padded with 0 */
    real *x, *x_slope, *weighted, *weighted_momentum, *carried, *scores, *weighted_scores, *columns; /* temporaries */
    /* backward: grad_x is the gradient of x, and g that of a layer's output */
    real *grad_state[LAYERS], *grad_transposed[LAYERS], *grad_anchor[LAYERS], *grad_last_anchor[LAYERS];
    real *grad_input[LAYERS], *grad_error[LAYERS];
    real *grad_read, *grad_scores, *grad_carry, *grad_carry_momentum, *grad_last, *grad_last_momentum;
    decay_grad decay_grad;
    real *g, *back, *grad_values, *grad_queries, *grad_gain, *grad_step;
} work;
