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

/* Two products of bytes fit into 16 bits here: codes are 0..15, and eight pairs of 15 * 127 stay below 2^15. */
INLINE i8x32 dot_codes(const u8 low[4], const u8 high[4], const int8_t *q) {
    __m256i sum = _mm256_setzero_si256();
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)low[j], (__m256i)four_bytes(q + 4 * j)));
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)high[j], (__m256i)four_bytes(q + 16 + 4 * j)));
    }
    return (i8x32)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

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
