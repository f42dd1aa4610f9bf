/* What the native library computes, and what its parts know of each other.
 *
 * dispatch.c    the exported functions: cut the work into parts, run them on all threads
 * threads.c     the one thread pool
 * body.h        the kernels, compiled once per instruction set by kernels_*.c into a table `struct kernels`
 *
 * All floating-point data is float32, row-major. Every output element is summed in one order that depends on
 * its own row only, so that a request computes the same whatever else is in the batch.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum {
    PANEL = 16,        /* columns of a float32 weight panel: [n / PANEL][k][PANEL] */
    QROWS = 8,         /* rows of a quantised weight panel */
    QBLOCK = 32,       /* weights that share a scale */
    KEY_TILE = 64,     /* keys that a prefill attends to at a time */
    QUERY_ROWS = 96,   /* rows (queries times heads of a group) that one part of a prefill computes */
    SPLIT = 128,       /* keys that one part of a decoding sequence attends to */
    MAX_HEAD_DIM = 256,
    MAX_GROUP = 16,    /* query heads per KV head */
};

/* Eight rows of a block of 32 weights w = d * q + m, q in 0..15. Byte j * 32 + r * 4 + i of `q` holds the codes
 * of row r: column 4 j + i in its low half, column 16 + 4 j + i in its high half. */
struct w4_block {
    uint16_t d[QROWS], m[QROWS]; /* float16 */
    uint8_t q[QROWS * QBLOCK / 2];
};

/* Eight rows of a block of 32 weights w = d * q. Byte j * 32 + r * 4 + i of `q` is column 4 j + i of row r. */
struct w8_block {
    uint16_t d[QROWS]; /* float16 */
    int8_t q[QROWS * QBLOCK];
};

/* Activations [m, k] quantised by blocks: x = d * q; `sum` is d times the sum of the codes of a block. */
struct activations {
    const int8_t *q;  /* [m, k] */
    const float *d;   /* [m, k / QBLOCK] */
    const float *sum; /* [m, k / QBLOCK] */
    long k;
};

/* Attention of a batch in one layer; library.py has the same structure. */
struct attention {
    const float *q;       /* [num_tokens, num_q_heads, head_dim], tokens q_stride floats apart */
    const float *k, *v;   /* [num_tokens, num_kv_heads, head_dim], tokens k_stride, v_stride floats apart */
    float *pool_k, *pool_v; /* [slots, num_kv_heads, head_dim] */
    float *out;           /* [num_tokens, num_q_heads, head_dim] */
    float *partial;       /* scratch: a record of heads per KV head * (head_dim + 2) floats for each decode part */
    const int64_t *out_slots; /* [num_tokens] slot of each token */
    const int32_t *slots; /* [rows, slots_stride]: slot of each position */
    const int64_t *rows, *seq_lens, *query_lens, *starts; /* per sequence; starts: its first token */
    /* [parts, 4]. A decode: sequence, KV head, chunk of keys, record or -1 if it is the only one.
     * A prefill: sequence, KV head, first query, number of queries. */
    const int32_t *parts;
    int64_t num_tokens, q_stride, k_stride, v_stride, slots_stride;
    int32_t num_q_heads, num_kv_heads, head_dim;
    int32_t window;       /* 0: none */
    float scale, softcap; /* softcap 0: none */
};

struct kernels {
    const char *name;
    void (*linear_f32)(const float *x, long ldx, const float *w, const float *bias, float *out, long ldo,
                       long m, long k, long first_panel, long last_panel, long n);
    void (*quantize_row)(const float *x, long k, int8_t *q, float *d, float *sum);
    void (*linear_w4)(const struct activations *x, const struct w4_block *w, const float *bias, float *out,
                      long ldo, long first_row, long last_row, long first_panel, long last_panel, long n);
    void (*linear_w8)(const struct activations *x, const struct w8_block *w, const float *bias, float *out,
                      long ldo, long first_row, long last_row, long first_panel, long last_panel, long n);
    void (*rms_norm)(const float *x, long ldx, float *residual, const float *weight, float eps, float *out,
                     long first_row, long last_row, long size);
    void (*rotate)(float *x, long token_stride, const float *cos, const float *sin, long first_token,
                   long last_token, long num_heads, long head_dim, long half);
    void (*gate)(const float *gate_up, float *out, long first_row, long last_row, long size, int is_gelu);
    void (*attend_decode)(const struct attention *a, long part);
    void (*attend_prefill)(const struct attention *a, long part);
    void (*merge_decode)(const struct attention *a, long sequence, long kv_head, long first_record,
                         long num_records);
};

extern const struct kernels kernels_generic;
#if defined(__x86_64__)
extern const struct kernels kernels_avx2;
extern const struct kernels kernels_avx512;
#endif

/* threads.c: call run(context, 0..num_parts-1), each once, on all threads; returns when all are done. */
typedef void part_function(void *context, long part);
void threads_run(part_function *run, void *context, long num_parts);
int threads_start(int num_threads);

static inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    union { uint32_t bits; float value; } u;
    if (exponent == 31)
        u.bits = sign | 0x7f800000u | mantissa << 13;
    else if (exponent)
        u.bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else {
        u.value = (float)mantissa * 0x1p-24f;
        u.bits |= sign;
    }
    return u.value;
}
