/* Numbers, vectors of them, and the functions of them that no instruction computes.

   Everything is compiled once for float and once for double (REAL). A vector is as wide as the machine's registers;
   the compiler turns operators on vectors into instructions, so there is no code for a particular machine here. */

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#if REAL == 32
typedef float real;
typedef int32_t whole;
#else
typedef double real;
typedef int64_t whole;
#endif

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef whole ints __attribute__((vector_size(VECTOR_BYTES)));
/* a vector in memory, wherever it begins */
typedef real stored __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef whole stored_ints __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

enum { WIDTH = VECTOR_BYTES / (int)sizeof(real) }; /* numbers in a vector */

INLINE int min(int a, int b) { return a < b ? a : b; }
INLINE int max(int a, int b) { return a > b ? a : b; }
INLINE int padded(int n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

INLINE vec load_vec(const real *p) { return *(const stored *)p; }
INLINE void store_vec(real *p, vec x) { *(stored *)p = x; }
INLINE vec all(real x) { return x - (vec){}; }
/* per number: where mask is all ones a, where it is zero b */
INLINE vec pick(ints mask, vec a, vec b) { return (vec)((mask & (ints)a) | (~mask & (ints)b)); }
INLINE vec absolute(vec x) { return pick(x < 0, -x, x); }

INLINE real sum(vec x) {
    real part[WIDTH];
    store_vec(part, x);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            part[i] += part[i + half];
    return part[0];
}

/* 1 where a row of n numbers has one, 0 behind its end: the last vector of the row */
INLINE vec inside(int n) {
    static const whole order[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return pick(*(const stored_ints *)order < (whole)(n - (padded(n) - WIDTH)), all(1), (vec){});
}

/* e^x for x <= 0; 0 below -87 (float) */
#if REAL == 32
INLINE vec exponential(vec given) {
    vec x = pick(given < -87, all(-87), given);
    vec shifted = x * (real)1.44269504088896341 + (real)12582912; /* rounds to a whole number */
    vec n = shifted - (real)12582912;
    x = x - n * (real)0.693359375 + n * (real)2.12194440e-4;
    vec p = x * (real)1.9875691500e-4 + (real)1.3981999507e-3;
    p = p * x + (real)8.3334519073e-3;
    p = p * x + (real)4.1665795894e-2;
    p = p * x + (real)1.6666665459e-1;
    p = p * x + (real)5.0000001201e-1;
    p = p * x * x + x + 1;
    return pick(given < -87, (vec){}, (vec)((ints)p + ((ints)shifted << 23)));
}
/* the normal distribution function, from its density's exponential e = exp(-x^2 / 2): error below 1e-7
   (Abramowitz and Stegun 7.1.26) */
INLINE vec normal(vec x, vec e) {
    vec t = 1 / (1 + absolute(x) * (real)(0.3275911 * 0.70710678118654752));
    vec p = t * (real)1.061405429 - (real)1.453152027;
    p = p * t + (real)1.421413741;
    p = p * t - (real)0.284496736;
    p = p * t + (real)0.254829592;
    vec tail = p * t * e * (real)0.5;
    return pick(x < 0, tail, 1 - tail);
}
#else
INLINE vec exponential(vec x) {
    for (int i = 0; i < WIDTH; i++)
        x[i] = exp(x[i]);
    return x;
}
INLINE vec normal(vec x, vec e) {
    (void)e;
    for (int i = 0; i < WIDTH; i++)
        x[i] = 0.5 * erfc(-x[i] * 0.70710678118654752440);
    return x;
}
#endif

INLINE vec logistic(vec x) {
    vec e = exponential(-absolute(x));
    return pick(x < 0, e, all(1)) / (1 + e);
}
