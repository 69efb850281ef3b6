/* What the products of matrices multiply: the numbers themselves or, where OPERAND is 16, those rounded to
   bfloat16.

   A machine with an instruction for it multiplies two pairs of bfloat16 numbers, and adds both products to a float sum,
   in the time of one product of floats. Two neighbors along the inner dimension are such a pair: a word, which
   takes the place of one number. What is rounded is what goes into a product; sums, and everything else, are float. */

#pragma once

#include "rows.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define CAN_NARROW 1
#else
#define CAN_NARROW 0
#endif

#if OPERAND == 16 && CAN_NARROW
#include <immintrin.h>
#define NARROW
enum { PAIR = 2 }; /* numbers in a word */

/* of each column of two rows, a word; to the nearest, ties to even */
INLINE vec pair_rows(vec first, vec second) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vec)_mm512_permutexvar_epi16(order, both);
}
/* of two neighbors each, a word */
INLINE vec pair_columns(vec first, vec second) { return (vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
INLINE vec add_product(vec total, vec left, vec right) {
    return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)left, (__m512bh)right);
}
#else
enum { PAIR = 1 };
INLINE vec add_product(vec total, vec left, vec right) { return total + left * right; }
#endif

INLINE int words(int numbers) { return (numbers + PAIR - 1) / PAIR; }
