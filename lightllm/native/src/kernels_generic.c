/* The kernels for any processor: what the compiler makes of plain C. */
#include "vectors.h"

INLINE i8x32 dot_signed(i8x32 acc, s8 w, s8 x) {
    for (int row = 0; row < QROWS; row++)
        for (int i = 0; i < 4; i++) acc[row] += w[row * 4 + i] * x[row * 4 + i];
    return acc;
}

INLINE i8x32 dot_codes(const u8 low[4], const u8 high[4], const int8_t *q) {
    i8x32 acc = {0};
    for (int j = 0; j < 4; j++) {
        acc = dot_signed(acc, (s8)low[j], four_bytes(q + 4 * j));
        acc = dot_signed(acc, (s8)high[j], four_bytes(q + 16 + 4 * j));
    }
    return acc;
}

INLINE f8 halves(const uint16_t *p) {
    f8 values;
    for (int i = 0; i < 8; i++) values[i] = half_to_float(p[i]);
    return values;
}

#define LL_NAME kernels_generic
#define LL_LABEL "generic"
#define LL_WIDTH 8
#include "body.h"
