/* The kernels for any processor: what the compiler makes of plain C. */
#include "vectors.h"

INLINE i8x32 dot_signed(i8x32 acc, s8 w, s8 x) {
    for (int row = 0; row < QROWS; row++)
        for (int i = 0; i < 4; i++) acc[row] += w[row * 4 + i] * x[row * 4 + i];
    return acc;
}

typedef i8x32 dot_sum;

INLINE dot_sum dot_add(dot_sum sum, u8 codes, const int8_t *q) { return dot_signed(sum, (s8)codes, four_bytes(q)); }

INLINE i8x32 dot_done(dot_sum sum) { return sum; }

INLINE f8 halves(const uint16_t *p) {
    f8 values;
    for (int i = 0; i < 8; i++) values[i] = half_to_float(p[i]);
    return values;
}

#define LL_NAME kernels_generic
#define LL_LABEL "generic"
#define LL_WIDTH 8
#include "body.h"
