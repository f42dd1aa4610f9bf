/* The kernels for AVX2, FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "vectors.h"

/* Sums of 16 bits are enough here: codes are 0..15, and eight pairs of products of 15 * 127 stay below 2^15. */
typedef int16_t dot_sum __attribute__((vector_size(32)));

INLINE dot_sum dot_add(dot_sum sum, u8 codes, const int8_t *q) {
    sum += (dot_sum)_mm256_maddubs_epi16((__m256i)codes, (__m256i)four_bytes(q));
    __asm__("" : "+x"(sum)); /* one sum after the other: a tree of them would not fit into the registers */
    return sum;
}

INLINE i8x32 dot_done(dot_sum sum) { return (i8x32)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }

/* The first factor of maddubs is unsigned: the sign of w moves over to x; 2 * 128 * 127 stays below 2^15. */
INLINE i8x32 dot_signed(i8x32 acc, s8 w, s8 x) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
    return acc + (i8x32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

INLINE f8 halves(const uint16_t *p) { return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

#define LL_NAME kernels_avx2
#define LL_LABEL "avx2"
#define LL_WIDTH 8
#include "body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
