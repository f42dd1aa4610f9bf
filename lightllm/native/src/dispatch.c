/* The exported functions: cut the work into parts and run them on all threads. See library.py for their contracts. */
#include "kernels.h"

#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static const struct kernels *chosen = &kernels_generic;

EXPORT int ll_version(void) { return 2; }

/* Choose the kernels (NULL: the best for this processor) and start threads; returns how many there are, 0 for a
 * name that is unknown or not supported here. */
EXPORT int ll_start(const char *name, int num_threads) {
    const struct kernels *tables[3];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        tables[count++] = &kernels_avx512;
    if (has_avx2) tables[count++] = &kernels_avx2;
#endif
    tables[count++] = &kernels_generic;
    for (int i = 0; i < count; i++)
        if (!name || !strcmp(name, tables[i]->name)) {
            chosen = tables[i];
            return threads_start(num_threads);
        }
    return 0;
}

EXPORT const char *ll_kernels(void) { return chosen->name; }

static long at_least_one(long x) { return x < 1 ? 1 : x; }
static long smaller(long a, long b) { return a < b ? a : b; }

/* ------------------------------------------------------------------ linears */

/* A job of `m` rows and `panels` panels is cut into blocks of rows, and runs of panels within them. */
struct cut {
    long m, panels, rows_each, panels_each, runs;
};

static struct cut cut_up(long m, long panels, long max_rows, long panels_each) {
    return (struct cut){m, panels, smaller(m, max_rows), panels_each, (panels + panels_each - 1) / panels_each};
}

static long num_parts(const struct cut *c) { return at_least_one((c->m + c->rows_each - 1) / c->rows_each) * c->runs; }

struct linear {
    struct cut cut;
    const float *x, *bias;
    const void *w;
    float *out;
    long ldx, ldo, k, n;
    struct activations activations;
};

static void run_f32(void *context, long part) {
    struct linear *l = context;
    long row = part / l->cut.runs * l->cut.rows_each, panel = part % l->cut.runs * l->cut.panels_each;
    chosen->linear_f32(l->x + row * l->ldx, l->ldx, l->w, l->bias, l->out + row * l->ldo, l->ldo,
                       smaller(l->cut.rows_each, l->cut.m - row), l->k, panel,
                       smaller(panel + l->cut.panels_each, l->cut.panels), l->n);
}

EXPORT void ll_linear_f32(const float *x, long ldx, const float *w, const float *bias, float *out, long ldo, long m,
                          long k, long n) {
    long panels = (n + PANEL - 1) / PANEL;
    struct linear l = {.cut = cut_up(m, panels, 96, panels >= 256 ? 8 : 2),
                       .x = x, .ldx = ldx, .w = w, .bias = bias, .out = out, .ldo = ldo, .k = k, .n = n};
    threads_run(run_f32, &l, num_parts(&l.cut));
}

struct quantize {
    const float *x;
    int8_t *q;
    float *d, *sum;
    long ldx, k, m;
};

enum { QUANTIZED_ROWS = 8 };

static void run_quantize(void *context, long part) {
    struct quantize *z = context;
    for (long row = part * QUANTIZED_ROWS; row < smaller((part + 1) * QUANTIZED_ROWS, z->m); row++)
        chosen->quantize_row(z->x + row * z->ldx, z->k, z->q + row * z->k, z->d + row * (z->k / QBLOCK),
                             z->sum + row * (z->k / QBLOCK));
}

/* Codes, scales and sums of the activations, into scratch of m * (k + 2 * 4 * k / QBLOCK) bytes. */
static struct activations quantize(const float *x, long ldx, long m, long k, void *scratch) {
    float *d = scratch, *sum = d + m * (k / QBLOCK);
    int8_t *q = (int8_t *)(sum + m * (k / QBLOCK));
    struct quantize z = {x, q, d, sum, ldx, k, m};
    threads_run(run_quantize, &z, (m + QUANTIZED_ROWS - 1) / QUANTIZED_ROWS);
    return (struct activations){q, d, sum, k};
}

#define DEFINE_RUN(name, kernel)                                                                                   \
    static void name(void *context, long part) {                                                                   \
        struct linear *l = context;                                                                                \
        long row = part / l->cut.runs * l->cut.rows_each, panel = part % l->cut.runs * l->cut.panels_each;         \
        chosen->kernel(&l->activations, l->w, l->bias, l->out, l->ldo, row,                                        \
                       smaller(row + l->cut.rows_each, l->cut.m), panel,                                           \
                       smaller(panel + l->cut.panels_each, l->cut.panels), l->n);                                  \
    }

DEFINE_RUN(run_w4, linear_w4)
DEFINE_RUN(run_w8, linear_w8)

static void linear_quantised(part_function *run, const float *x, long ldx, const void *w, const float *bias, float *out,
                             long ldo, long m, long k, long n, void *scratch) {
    long panels = (n + QROWS - 1) / QROWS;
    struct linear l = {.cut = cut_up(m, panels, 64, panels >= 512 ? 16 : 4),
                       .w = w, .bias = bias, .out = out, .ldo = ldo, .k = k, .n = n,
                       .activations = quantize(x, ldx, m, k, scratch)};
    threads_run(run, &l, num_parts(&l.cut));
}

EXPORT void ll_linear_w4(const float *x, long ldx, const void *w, const float *bias, float *out, long ldo, long m,
                         long k, long n, void *scratch) {
    linear_quantised(run_w4, x, ldx, w, bias, out, ldo, m, k, n, scratch);
}

EXPORT void ll_linear_w8(const float *x, long ldx, const void *w, const float *bias, float *out, long ldo, long m,
                         long k, long n, void *scratch) {
    linear_quantised(run_w8, x, ldx, w, bias, out, ldo, m, k, n, scratch);
}

/* ------------------------------------------------------------------ packing weights and reading rows of them */

EXPORT void ll_pack_f32(const float *from, long first_row, long rows, long k, float *to) {
    for (long r = 0; r < rows; r++) {
        long row = first_row + r;
        float *panel = to + row / PANEL * k * PANEL + row % PANEL;
        for (long i = 0; i < k; i++) panel[i * PANEL] = from[r * k + i];
    }
}

EXPORT void ll_rows_f32(const float *w, long k, const int64_t *indices, long count, float *out) {
    for (long r = 0; r < count; r++) {
        const float *panel = w + indices[r] / PANEL * k * PANEL + indices[r] % PANEL;
        for (long i = 0; i < k; i++) out[r * k + i] = panel[i * PANEL];
    }
}

/* q: [rows, k / 2], 16 bytes a block: column i in the low half of byte i, column 16 + i in its high half;
 * d, m: [rows, k / QBLOCK] float16. Panels must be zero before their first row. */
EXPORT void ll_pack_w4(const uint8_t *q, const uint16_t *d, const uint16_t *m, long first_row, long rows, long k,
                       struct w4_block *to) {
    long blocks = k / QBLOCK;
    for (long r = 0; r < rows; r++)
        for (long b = 0; b < blocks; b++) {
            long row = first_row + r, lane = row % QROWS;
            struct w4_block *block = to + row / QROWS * blocks + b;
            block->d[lane] = d[r * blocks + b];
            block->m[lane] = m[r * blocks + b];
            for (int j = 0; j < 4; j++) memcpy(block->q + j * 32 + lane * 4, q + (r * blocks + b) * 16 + 4 * j, 4);
        }
}

EXPORT void ll_rows_w4(const struct w4_block *w, long k, const int64_t *indices, long count, float *out) {
    long blocks = k / QBLOCK;
    for (long r = 0; r < count; r++)
        for (long b = 0; b < blocks; b++) {
            long lane = indices[r] % QROWS;
            const struct w4_block *block = w + indices[r] / QROWS * blocks + b;
            float d = half_to_float(block->d[lane]), m = half_to_float(block->m[lane]), *to = out + r * k + b * QBLOCK;
            for (int i = 0; i < 16; i++) {
                uint8_t codes = block->q[i / 4 * 32 + lane * 4 + i % 4];
                to[i] = d * (float)(codes & 15) + m;
                to[16 + i] = d * (float)(codes >> 4) + m;
            }
        }
}

/* q: [rows, k] signed codes; d: [rows, k / QBLOCK] float16. */
EXPORT void ll_pack_w8(const int8_t *q, const uint16_t *d, long first_row, long rows, long k, struct w8_block *to) {
    long blocks = k / QBLOCK;
    for (long r = 0; r < rows; r++)
        for (long b = 0; b < blocks; b++) {
            long row = first_row + r, lane = row % QROWS;
            struct w8_block *block = to + row / QROWS * blocks + b;
            block->d[lane] = d[r * blocks + b];
            for (int j = 0; j < 8; j++)
                memcpy(block->q + j * 32 + lane * 4, q + r * k + b * QBLOCK + 4 * j, 4);
        }
}

EXPORT void ll_rows_w8(const struct w8_block *w, long k, const int64_t *indices, long count, float *out) {
    long blocks = k / QBLOCK;
    for (long r = 0; r < count; r++)
        for (long b = 0; b < blocks; b++) {
            long lane = indices[r] % QROWS;
            const struct w8_block *block = w + indices[r] / QROWS * blocks + b;
            float d = half_to_float(block->d[lane]);
            for (int i = 0; i < QBLOCK; i++)
                out[r * k + b * QBLOCK + i] = d * (float)block->q[i / 4 * 32 + lane * 4 + i % 4];
        }
}

/* ------------------------------------------------------------------ small operations */

enum { SMALL_JOB = 16384 }; /* elements below which waking other threads costs more than it brings */

struct rows {
    const float *x, *weight, *cos, *sin;
    float *residual, *out;
    long ldx, m, size, rows_each, num_heads, half;
    float eps;
    int is_gelu;
};

static void run_rows(part_function *run, struct rows *r, long size) {
    r->rows_each = at_least_one(SMALL_JOB / size);
    threads_run(run, r, (r->m + r->rows_each - 1) / r->rows_each);
}

static void run_norm(void *context, long part) {
    struct rows *r = context;
    chosen->rms_norm(r->x, r->ldx, r->residual, r->weight, r->eps, r->out, part * r->rows_each,
                     smaller((part + 1) * r->rows_each, r->m), r->size);
}

EXPORT void ll_rms_norm(const float *x, long ldx, float *residual, const float *weight, float eps, float *out, long m,
                        long size) {
    struct rows r = {.x = x, .ldx = ldx, .residual = residual, .weight = weight, .eps = eps, .out = out, .m = m,
                     .size = size};
    run_rows(run_norm, &r, size);
}

static void run_rotate(void *context, long part) {
    struct rows *r = context;
    chosen->rotate(r->out, r->ldx, r->cos, r->sin, part * r->rows_each, smaller((part + 1) * r->rows_each, r->m),
                   r->num_heads, r->size, r->half);
}

EXPORT void ll_rotate(float *x, long token_stride, const float *cos, const float *sin, long tokens, long num_heads,
                      long head_dim, long half) {
    struct rows r = {.out = x, .ldx = token_stride, .cos = cos, .sin = sin, .m = tokens, .num_heads = num_heads,
                     .size = head_dim, .half = half};
    run_rows(run_rotate, &r, num_heads * head_dim);
}

static void run_gate(void *context, long part) {
    struct rows *r = context;
    chosen->gate(r->x, r->out, part * r->rows_each, smaller((part + 1) * r->rows_each, r->m), r->size, r->is_gelu);
}

EXPORT void ll_gate(const float *gate_up, float *out, long m, long size, int is_gelu) {
    struct rows r = {.x = gate_up, .out = out, .m = m, .size = size, .is_gelu = is_gelu};
    run_rows(run_gate, &r, size);
}

/* ------------------------------------------------------------------ attention */

static void run_decode(void *context, long part) { chosen->attend_decode(context, part); }
static void run_prefill(void *context, long part) { chosen->attend_prefill(context, part); }

struct merge {
    const struct attention *attention;
    const int32_t *merges; /* [count, 4]: sequence, KV head, first record, number of records */
};

static void run_merge(void *context, long part) {
    struct merge *merge = context;
    const int32_t *m = merge->merges + 4 * part;
    chosen->merge_decode(merge->attention, m[0], m[1], m[2], m[3]);
}

EXPORT void ll_attend(struct attention *a, const int32_t *decodes, long num_decodes, const int32_t *merges,
                      long num_merges, const int32_t *prefills, long num_prefills) {
    long size = (long)a->num_kv_heads * a->head_dim;
    for (long token = 0; token < a->num_tokens; token++) {
        memcpy(a->pool_k + a->out_slots[token] * size, a->k + token * a->k_stride, (size_t)size * 4);
        memcpy(a->pool_v + a->out_slots[token] * size, a->v + token * a->v_stride, (size_t)size * 4);
    }
    a->parts = decodes;
    threads_run(run_decode, a, num_decodes);
    struct merge merge = {a, merges};
    threads_run(run_merge, &merge, num_merges);
    a->parts = prefills;
    threads_run(run_prefill, a, num_prefills);
}
