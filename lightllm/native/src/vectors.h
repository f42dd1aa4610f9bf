/* Vector types that do not depend on the instruction set; the compiler maps them to what there is. */
#pragma once

#include "kernels.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float f4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8x32 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint8_t u8 __attribute__((vector_size(32), aligned(1), may_alias));
typedef int8_t s8 __attribute__((vector_size(32), aligned(1), may_alias));

/* Four neighbouring bytes, repeated. */
INLINE s8 four_bytes(const int8_t *q) {
    int32_t word;
    memcpy(&word, q, 4);
    i8x32 words = (i8x32){0} + word;
    return (s8)words;
}
