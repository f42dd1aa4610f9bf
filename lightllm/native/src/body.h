/* The kernels. Included once per instruction set, which defines
 *
 *   LL_NAME            suffix of the table's name
 *   LL_WIDTH           floats in a vector: 8 or 16
 *   LL_LABEL           its readable name
 *
 * and the functions
 *
 *   dot_add(sum, codes, q)   add codes 0..15 of eight rows times four activations to a `dot_sum`
 *   dot_done(sum)            the eight int32 of at most eight such additions
 *   dot_signed(acc, w, x)    acc + products of signed bytes, four neighbours added into each int32
 *   halves(p)                eight float16 at p as floats
 *
 * and switches the compiler to that instruction set around this file.
 */
#include "vectors.h"

typedef float vf __attribute__((vector_size(LL_WIDTH * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(LL_WIDTH * 4), aligned(4), may_alias));

enum { VECTORS = PANEL / LL_WIDTH };

/* ------------------------------------------------------------------ float32 products */

/* out[r][0..PANEL) = init + sum over k of x[r][k] * w[k][0..PANEL), for `rows` rows (a constant) and
 * `panels` neighbouring panels (a constant), each summed in the order of k. */
INLINE void tile_f32(const float *x, long ldx, const float *w, long k, float *out, long ldo, int rows, int panels,
                     int accumulates) {
    vf acc[8][2 * VECTORS];
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 8") for (int v = 0; v < panels * VECTORS; v++)
            acc[r][v] = accumulates ? *(const vf *)(out + r * ldo + v * LL_WIDTH) : (vf){0};
    for (long i = 0; i < k; i++) {
        vf weights[2 * VECTORS];
        _Pragma("GCC unroll 8") for (int v = 0; v < panels * VECTORS; v++)
            weights[v] = *(const vf *)(w + v / VECTORS * k * PANEL + i * PANEL + v % VECTORS * LL_WIDTH);
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
            _Pragma("GCC unroll 8") for (int v = 0; v < panels * VECTORS; v++)
                acc[r][v] += weights[v] * x[r * ldx + i];
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 8") for (int v = 0; v < panels * VECTORS; v++)
            *(vf *)(out + r * ldo + v * LL_WIDTH) = acc[r][v];
}

/* Any number of rows and one panel; `out` has room for whole panels. */
INLINE void rows_f32(const float *x, long ldx, const float *w, long k, float *out, long ldo, long rows,
                     int accumulates) {
    long r = 0;
    for (; r + 6 <= rows; r += 6) tile_f32(x + r * ldx, ldx, w, k, out + r * ldo, ldo, 6, 1, accumulates);
    if (rows - r >= 4) {
        tile_f32(x + r * ldx, ldx, w, k, out + r * ldo, ldo, 4, 1, accumulates);
        r += 4;
    }
    if (rows - r >= 2) {
        tile_f32(x + r * ldx, ldx, w, k, out + r * ldo, ldo, 2, 1, accumulates);
        r += 2;
    }
    if (rows - r) tile_f32(x + r * ldx, ldx, w, k, out + r * ldo, ldo, 1, 1, accumulates);
}

/* Copy what exists of a panel's columns to the result, with the bias. */
INLINE void store_columns(float *out, const float *values, const float *bias, long first, long n, int width) {
    long count = n - first < width ? n - first : width;
    for (long j = 0; j < count; j++) out[first + j] = values[j] + (bias ? bias[first + j] : 0.0f);
}

static void linear_f32(const float *x, long ldx, const float *w, const float *bias, float *out, long ldo, long m,
                       long k, long first_panel, long last_panel, long n) {
    enum { MAX_ROWS = 96 };
    float values[MAX_ROWS * PANEL];
    long panel = first_panel;
    if (m == 1) /* bound by reading weights: two streams at once hide the latency of the additions */
        for (; panel + 2 <= last_panel; panel += 2) {
            tile_f32(x, ldx, w + panel * k * PANEL, k, values, 2 * PANEL, 1, 2, 0);
            store_columns(out, values, bias, panel * PANEL, n, 2 * PANEL);
        }
    for (; panel < last_panel; panel++)
        for (long row = 0; row < m; row += MAX_ROWS) {
            long rows = m - row < MAX_ROWS ? m - row : MAX_ROWS;
            rows_f32(x + row * ldx, ldx, w + panel * k * PANEL, k, values, PANEL, rows, 0);
            for (long r = 0; r < rows; r++)
                store_columns(out + (row + r) * ldo, values + r * PANEL, bias, panel * PANEL, n, PANEL);
        }
}

/* ------------------------------------------------------------------ quantised products */

static void quantize_row(const float *x, long k, int8_t *q, float *d, float *sum) {
    for (long block = 0; block < k / QBLOCK; block++) {
        const float *values = x + block * QBLOCK;
        float largest = 0.0f;
        for (int i = 0; i < QBLOCK; i++) largest = fmaxf(largest, fabsf(values[i]));
        float scale = largest / 127.0f, inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        int total = 0;
        for (int i = 0; i < QBLOCK; i++) {
            int code = (int)rintf(values[i] * inverse);
            q[block * QBLOCK + i] = (int8_t)code;
            total += code;
        }
        d[block] = scale;
        sum[block] = scale * (float)total;
    }
}

/* `rows` rows of activations (a constant) against one panel of eight weight rows. */
INLINE void tile_w4(const struct activations *x, long row, const struct w4_block *w, float values[][QROWS], int rows) {
    long blocks = x->k / QBLOCK;
    f8 acc[4];
    for (int r = 0; r < rows; r++) acc[r] = (f8){0};
    for (long b = 0; b < blocks; b++) {
        dot_sum sum[4];
        _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++) sum[r] = (dot_sum){0};
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) { /* few codes at a time: all must fit in registers */
            u8 codes = *(const u8 *)(w[b].q + 32 * j);
            u8 low = codes & 15, high = codes >> 4;
            _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++) {
                const int8_t *q = x->q + (row + r) * x->k + b * QBLOCK + 4 * j;
                sum[r] = dot_add(dot_add(sum[r], low, q), high, q + 16);
            }
        }
        f8 d = halves(w[b].d), m = halves(w[b].m);
        _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++) {
            acc[r] += __builtin_convertvector(dot_done(sum[r]), f8) * (d * x->d[(row + r) * blocks + b]);
            acc[r] += m * x->sum[(row + r) * blocks + b];
        }
    }
    for (int r = 0; r < rows; r++) *(f8 *)values[r] = acc[r];
}

INLINE void tile_w8(const struct activations *x, long row, const struct w8_block *w, float values[][QROWS], int rows) {
    long blocks = x->k / QBLOCK;
    f8 acc[4];
    for (int r = 0; r < rows; r++) acc[r] = (f8){0};
    for (long b = 0; b < blocks; b++) {
        f8 d = halves(w[b].d);
        _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++) {
            const int8_t *q = x->q + (row + r) * x->k + b * QBLOCK;
            i8x32 dot = {0};
            _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++)
                dot = dot_signed(dot, *(const s8 *)(w[b].q + 32 * j), four_bytes(q + 4 * j));
            acc[r] += __builtin_convertvector(dot, f8) * (d * x->d[(row + r) * blocks + b]);
        }
    }
    for (int r = 0; r < rows; r++) *(f8 *)values[r] = acc[r];
}

#define DEFINE_LINEAR(name, tile, block_type)                                                                     \
    static void name(const struct activations *x, const struct block_type *w, const float *bias, float *out,      \
                     long ldo, long first_row, long last_row, long first_panel, long last_panel, long n) {        \
        long blocks = x->k / QBLOCK;                                                                              \
        for (long panel = first_panel; panel < last_panel; panel++) {                                             \
            const struct block_type *weights = w + panel * blocks;                                                \
            float values[4][QROWS];                                                                               \
            long row = first_row;                                                                                 \
            for (; row + 4 <= last_row; row += 4) {                                                               \
                tile(x, row, weights, values, 4);                                                                 \
                for (int r = 0; r < 4; r++)                                                                       \
                    store_columns(out + (row + r) * ldo, values[r], bias, panel * QROWS, n, QROWS);               \
            }                                                                                                     \
            for (; row < last_row; row++) {                                                                       \
                tile(x, row, weights, values, 1);                                                                 \
                store_columns(out + row * ldo, values[0], bias, panel * QROWS, n, QROWS);                         \
            }                                                                                                     \
        }                                                                                                         \
    }

DEFINE_LINEAR(linear_w4, tile_w4, w4_block)
DEFINE_LINEAR(linear_w8, tile_w8, w8_block)

/* ------------------------------------------------------------------ small operations */

INLINE float sum_of(vf v) {
    f4 quarters[LL_WIDTH / 4];
    memcpy(quarters, &v, sizeof v);
    f4 s = quarters[0] + quarters[1];
    for (int i = 2; i < LL_WIDTH / 4; i++) s += quarters[i];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

INLINE vf select_of(vi condition, vf yes, vf no) { return (vf)((condition & (vi)yes) | (~condition & (vi)no)); }

/* e^x by 2^n times a polynomial for the rest; x is cut to [-87, 88]. Relative error below 3e-7. */
INLINE vf exp_of(vf x) {
    x = select_of(x < -87.0f, (vf){0} - 87.0f, x);
    x = select_of(x > 88.0f, (vf){0} + 88.0f, x);
    vf scaled = x * 1.44269504f;
    vi n = __builtin_convertvector(scaled + select_of(scaled < 0.0f, (vf){0} - 0.5f, (vf){0} + 0.5f), vi);
    vf rest = x - __builtin_convertvector(n, vf) * 0.693359375f + __builtin_convertvector(n, vf) * 2.12194440e-4f;
    vf p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    return p * (vf)((n + 127) << 23);
}

static void rms_norm(const float *x, long ldx, float *residual, const float *weight, float eps, float *out,
                     long first_row, long last_row, long size) {
    for (long row = first_row; row < last_row; row++) {
        const float *values = x + row * ldx;
        if (residual) {
            float *kept = residual + row * size;
            for (long i = 0; i < size; i++) kept[i] += values[i];
            values = kept;
        }
        vf squares = {0};
        long i = 0;
        for (; i + LL_WIDTH <= size; i += LL_WIDTH) {
            vf v = *(const vf *)(values + i);
            squares += v * v;
        }
        float total = sum_of(squares);
        for (; i < size; i++) total += values[i] * values[i];
        float scale = 1.0f / sqrtf(total / (float)size + eps);
        for (i = 0; i < size; i++) out[row * size + i] = values[i] * scale * weight[i];
    }
}

static void rotate(float *x, long token_stride, const float *cos, const float *sin, long first_token, long last_token,
                   long num_heads, long head_dim, long half) {
    for (long token = first_token; token < last_token; token++)
        for (long head = 0; head < num_heads; head++) {
            float *a = x + token * token_stride + head * head_dim, *b = a + half;
            const float *c = cos + token * half, *s = sin + token * half;
            for (long i = 0; i < half; i++) {
                float first = a[i], second = b[i];
                a[i] = first * c[i] - second * s[i];
                b[i] = second * c[i] + first * s[i];
            }
        }
}

/* silu(x) = x / (1 + e^-x); gelu by tanh(u) = 1 - 2 / (1 + e^2u). */
static void gate(const float *gate_up, float *out, long first_row, long last_row, long size, int is_gelu) {
    for (long row = first_row; row < last_row; row++) {
        const float *g = gate_up + row * 2 * size, *up = g + size;
        float *result = out + row * size;
        long i = 0;
        for (; i < size; i += LL_WIDTH) {
            long count = size - i < LL_WIDTH ? size - i : LL_WIDTH;
            vf x = {0}, u = {0};
            memcpy(&x, g + i, (size_t)count * 4);
            memcpy(&u, up + i, (size_t)count * 4);
            vf exponent = -x;
            if (is_gelu) exponent = (x + x * x * x * 0.044715f) * -1.5957691216f;
            vf value = x / (exp_of(exponent) + 1.0f) * u;
            memcpy(result + i, &value, (size_t)count * 4);
        }
    }
}

#include "attention.h"

const struct kernels LL_NAME = {
    LL_LABEL, linear_f32,    quantize_row,   linear_w4,   linear_w8, rms_norm,
    rotate,   gate,          attend_decode,  attend_prefill, merge_decode,
};
