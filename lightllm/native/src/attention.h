/* Attention over the pool; part of body.h.
 *
 * A part of a decoding sequence is one KV head and SPLIT keys; the parts of a sequence are merged in order by
 * their log-sum-exp. A part of a prefill is one KV head and a run of queries, which walk over their keys in
 * tiles with a running maximum (https://arxiv.org/abs/2205.14135). The keys and values of a tile are copied into
 * weight panels, so that both products are those of linear layers. Which keys form a tile depends on positions
 * only.
 */
INLINE float capped(float score, float softcap) { return softcap > 0.0f ? softcap * tanhf(score / softcap) : score; }

/* Softmax weights of `count` scores in place, relative to their largest; returns it and adds up the weights. */
INLINE float weigh(float *scores, long count, float *total) {
    float largest = -INFINITY;
    for (long i = 0; i < count; i++) largest = fmaxf(largest, scores[i]);
    vf sums = {0};
    for (long i = 0; i < count; i += LL_WIDTH) {
        long left = count - i;
        vf e = exp_of(*(const vf *)(scores + i) - largest);
        if (left < LL_WIDTH)
            for (long j = left; j < LL_WIDTH; j++) e[j] = 0.0f;
        *(vf *)(scores + i) = e;
        sums += e;
    }
    *total = sum_of(sums);
    return largest;
}

/* scores[g][i] = q[g] . keys[i] for `heads` query heads (a constant) and four keys. */
INLINE void dot_keys(const float *q, const float *const keys[4], long dim, float *scores, long lds, int heads) {
    vf acc[4][4];
    _Pragma("GCC unroll 4") for (int g = 0; g < heads; g++)
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) acc[g][i] = (vf){0};
    for (long j = 0; j < dim; j += LL_WIDTH) {
        vf key[4];
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) key[i] = *(const vf *)(keys[i] + j);
        _Pragma("GCC unroll 4") for (int g = 0; g < heads; g++) {
            vf query = *(const vf *)(q + g * dim + j);
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) acc[g][i] += query * key[i];
        }
    }
    _Pragma("GCC unroll 4") for (int g = 0; g < heads; g++)
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) scores[g * lds + i] = sum_of(acc[g][i]);
}

/* sums[g][0..PANEL) = sum over i of weights[g][i] * values[i][0..PANEL), for `heads` query heads (a constant). */
INLINE void add_values(const float *values, long stride, const int32_t *slots, long count, const float *weights,
                       long ldw, float *sums, long dim, int heads) {
    vf acc[4][VECTORS];
    _Pragma("GCC unroll 4") for (int g = 0; g < heads; g++)
        _Pragma("GCC unroll 2") for (int v = 0; v < VECTORS; v++) acc[g][v] = (vf){0};
    for (long i = 0; i < count; i++) {
        const float *value = values + slots[i] * stride;
        _Pragma("GCC unroll 2") for (int v = 0; v < VECTORS; v++) {
            vf part = *(const vf *)(value + v * LL_WIDTH);
            _Pragma("GCC unroll 4") for (int g = 0; g < heads; g++) acc[g][v] += part * weights[g * ldw + i];
        }
    }
    _Pragma("GCC unroll 4") for (int g = 0; g < heads; g++)
        _Pragma("GCC unroll 2") for (int v = 0; v < VECTORS; v++) *(vf *)(sums + g * dim + v * LL_WIDTH) = acc[g][v];
}

enum { SCORES = SPLIT + 16 };

/* Up to four query heads (a constant) over all keys of a part: weighted values in `sums`, and what they weigh. */
INLINE void attend_heads(const struct attention *a, const float *q, const float *keys, const float *values,
                         const int32_t *slots, long count, float *sums, float *maxima, float *totals, int heads) {
    long dim = a->head_dim, stride = (long)a->num_kv_heads * dim;
    float scores[4 * SCORES];
    for (long i = 0; i < count; i += 4) {
        const float *four[4]; /* behind the end the last key stands in; its scores are not read */
        for (int k = 0; k < 4; k++) four[k] = keys + slots[i + k < count ? i + k : count - 1] * stride;
        for (long next = i + 4; next < i + 8 && next < count; next++)
            for (long line = 0; line < dim; line += 16) __builtin_prefetch(keys + slots[next] * stride + line);
        dot_keys(q, four, dim, scores + i, SCORES, heads);
    }
    for (int g = 0; g < heads; g++) {
        for (long i = 0; i < count; i++) scores[g * SCORES + i] *= a->scale;
        if (a->softcap > 0.0f)
            for (long i = 0; i < count; i++) scores[g * SCORES + i] = capped(scores[g * SCORES + i], a->softcap);
        maxima[g] = weigh(scores + g * SCORES, count, &totals[g]);
    }
    for (long j = 0; j < dim; j += PANEL)
        add_values(values + j, stride, slots, count, scores, SCORES, sums + j, dim, heads);
}

static void attend_decode(const struct attention *a, long part) {
    const int32_t *p = a->parts + 4 * part;
    long sequence = p[0], head = p[1], chunk = p[2], record = p[3], dim = a->head_dim;
    long group = a->num_q_heads / a->num_kv_heads;
    long length = a->seq_lens[sequence];
    long first = chunk * SPLIT, last = first + SPLIT < length ? first + SPLIT : length;
    if (a->window && first < length - a->window) first = length - a->window;
    long count = last - first;
    const int32_t *slots = a->slots + a->rows[sequence] * a->slots_stride + first;
    const float *q = a->q + a->starts[sequence] * a->q_stride + head * group * dim;
    const float *keys = a->pool_k + head * dim, *values = a->pool_v + head * dim;
    float maxima[MAX_GROUP], totals[MAX_GROUP], sums[MAX_GROUP * MAX_HEAD_DIM];
    long g = 0;
#define ATTEND(heads) \
    attend_heads(a, q + g * dim, keys, values, slots, count, sums + g * dim, maxima + g, totals + g, heads)
    for (; g + 3 <= group; g += 3) ATTEND(3);
    if (group - g == 2) ATTEND(2);
    if (group - g == 1) ATTEND(1);
#undef ATTEND
    for (g = 0; g < group; g++) {
        if (record < 0) {
            float *out = a->out + (a->starts[sequence] * a->num_q_heads + head * group + g) * dim;
            for (long j = 0; j < dim; j++) out[j] = sums[g * dim + j] / totals[g];
            continue;
        }
        float *kept = a->partial + (record * group + g) * (dim + 2);
        kept[0] = maxima[g];
        kept[1] = totals[g];
        memcpy(kept + 2, sums + g * dim, (size_t)dim * 4);
    }
}

static void merge_decode(const struct attention *a, long sequence, long head, long first_record, long num_records) {
    long group = a->num_q_heads / a->num_kv_heads, dim = a->head_dim, size = dim + 2;
    for (long g = 0; g < group; g++) {
        const float *records = a->partial + (first_record * group + g) * size;
        float largest = -INFINITY, total = 0.0f;
        for (long i = 0; i < num_records; i++) largest = fmaxf(largest, records[i * group * size]);
        float *out = a->out + (a->starts[sequence] * a->num_q_heads + head * group + g) * dim;
        memset(out, 0, (size_t)dim * 4);
        for (long i = 0; i < num_records; i++) {
            const float *record = records + i * group * size;
            float share = expf(record[0] - largest);
            total += share * record[1];
            for (long j = 0; j < dim; j++) out[j] += share * record[2 + j];
        }
        for (long j = 0; j < dim; j++) out[j] /= total;
    }
}

/* Copy the keys of a tile into panels [KEY_TILE / PANEL][dim][PANEL], its values into [dim / PANEL][KEY_TILE][PANEL];
 * what lies behind the last key is zero. */
INLINE void pack_tile(const struct attention *a, const int32_t *slots, long head, long count, float *keys,
                      float *values) {
    long dim = a->head_dim, stride = (long)a->num_kv_heads * dim;
    static const float zeros[MAX_HEAD_DIM];
    for (long first = 0; first < KEY_TILE; first += PANEL) {
        const float *rows[PANEL];
        for (long i = 0; i < PANEL; i++)
            rows[i] = first + i < count ? a->pool_k + slots[first + i] * stride + head * dim : zeros;
        float *panel = keys + first * dim;
        for (long j = 0; j < dim; j++)
            _Pragma("GCC unroll 16") for (long i = 0; i < PANEL; i++) panel[j * PANEL + i] = rows[i][j];
    }
    for (long i = 0; i < KEY_TILE; i++) {
        const float *from = i < count ? a->pool_v + slots[i] * stride + head * dim : zeros;
        for (long j = 0; j < dim; j += PANEL)
            memcpy(values + j / PANEL * KEY_TILE * PANEL + i * PANEL, from + j, PANEL * 4);
    }
}

/* Scores of one row: cut what it may not see, then weights relative to the new maximum. Returns the factor by
 * which what was summed so far shrinks. */
INLINE float fold(float *scores, long first_seen, long end_seen, float scale, float softcap, float *maximum,
                  float *total) {
    if (end_seen <= first_seen) {
        memset(scores, 0, KEY_TILE * 4);
        return 1.0f;
    }
    if (softcap > 0.0f) {
        for (long i = first_seen; i < end_seen; i++) scores[i] = capped(scores[i] * scale, softcap);
        scale = 1.0f;
    }
    vi index;
    for (int i = 0; i < LL_WIDTH; i++) index[i] = i;
    vf tops = (vf){0} - INFINITY;
    for (int i = 0; i < KEY_TILE; i += LL_WIDTH, index += LL_WIDTH) {
        vf score = *(const vf *)(scores + i) * scale;
        score = select_of((index >= (int)first_seen) & (index < (int)end_seen), score, (vf){0} - INFINITY);
        tops = select_of(score > tops, score, tops);
        *(vf *)(scores + i) = score;
    }
    float largest = *maximum;
    for (int i = 0; i < LL_WIDTH; i++) largest = fmaxf(largest, tops[i]);
    vf sums = {0};
    for (int i = 0; i < KEY_TILE; i += LL_WIDTH) {
        vf score = *(const vf *)(scores + i);
        vf weight = select_of(score == -INFINITY, (vf){0}, exp_of(score - largest));
        *(vf *)(scores + i) = weight;
        sums += weight;
    }
    float shrink = *maximum == -INFINITY ? 0.0f : expf(*maximum - largest);
    *total = *total * shrink + sum_of(sums);
    *maximum = largest;
    return shrink;
}

static void attend_prefill(const struct attention *a, long part) {
    const int32_t *p = a->parts + 4 * part;
    long sequence = p[0], head = p[1], first_query = p[2], num_queries = p[3], dim = a->head_dim;
    long group = a->num_q_heads / a->num_kv_heads, rows = num_queries * group;
    long past = a->seq_lens[sequence] - a->query_lens[sequence]; /* position of the first query */
    long start = past + first_query, end = start + num_queries;
    const int32_t *slots = a->slots + a->rows[sequence] * a->slots_stride;
    float q[QUERY_ROWS * MAX_HEAD_DIM], sums[QUERY_ROWS * MAX_HEAD_DIM];
    float keys[KEY_TILE * MAX_HEAD_DIM], values[KEY_TILE * MAX_HEAD_DIM], scores[QUERY_ROWS * KEY_TILE];
    float maxima[QUERY_ROWS], totals[QUERY_ROWS];
    for (long r = 0; r < rows; r++) { /* row = query * group + head in the group */
        long token = a->starts[sequence] + first_query + r / group;
        memcpy(q + r * dim, a->q + token * a->q_stride + (head * group + r % group) * dim, (size_t)dim * 4);
        maxima[r] = -INFINITY;
        totals[r] = 0.0f;
    }
    memset(sums, 0, (size_t)(rows * dim) * 4);
    long first_key = a->window && start >= a->window ? start - a->window + 1 : 0;
    for (long tile = first_key / KEY_TILE * KEY_TILE; tile < end; tile += KEY_TILE) {
        long count = end - tile < KEY_TILE ? end - tile : KEY_TILE;
        pack_tile(a, slots + tile, head, count, keys, values);
        for (long panel = 0; panel < KEY_TILE / PANEL; panel++)
            rows_f32(q, dim, keys + panel * dim * PANEL, dim, scores + panel * PANEL, KEY_TILE, rows, 0);
        for (long r = 0; r < rows; r++) {
            long position = start + r / group;
            long seen_from = a->window ? position - a->window + 1 - tile : 0, seen_to = position + 1 - tile;
            if (seen_from < 0) seen_from = 0;
            if (seen_to > KEY_TILE) seen_to = KEY_TILE;
            float shrink = fold(scores + r * KEY_TILE, seen_from, seen_to, a->scale, a->softcap, &maxima[r],
                                &totals[r]);
            if (shrink != 1.0f)
                for (long j = 0; j < dim; j++) sums[r * dim + j] *= shrink;
        }
        for (long panel = 0; panel < dim / PANEL; panel++)
            rows_f32(scores, KEY_TILE, values + panel * KEY_TILE * PANEL, KEY_TILE, sums + panel * PANEL, dim, rows, 1);
    }
    for (long r = 0; r < rows; r++) {
        long token = a->starts[sequence] + first_query + r / group;
        float *out = a->out + (token * a->num_q_heads + head * group + r % group) * dim;
        for (long j = 0; j < dim; j++) out[j] = sums[r * dim + j] / totals[r];
    }
}
