/* The kernels for AVX-512 with VNNI: wider float32 vectors, and byte products that add into 32 bits at once. */
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif

#include "vectors.h"

typedef i8x32 dot_sum;

INLINE dot_sum dot_add(dot_sum sum, u8 codes, const int8_t *q) {
    return (dot_sum)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)codes, (__m256i)four_bytes(q));
}

INLINE i8x32 dot_done(dot_sum sum) { return sum; }

/* The first factor is unsigned: the sign of w moves over to x. */
INLINE i8x32 dot_signed(i8x32 acc, s8 w, s8 x) {
    return (i8x32)_mm256_dpbusd_epi32((__m256i)acc, _mm256_abs_epi8((__m256i)w),
                                      _mm256_sign_epi8((__m256i)x, (__m256i)w));
}

INLINE f8 halves(const uint16_t *p) { return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

#define LL_NAME kernels_avx512
#define LL_LABEL "avx512-vnni"
#define LL_WIDTH 16
#include "body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
