/* Attention of the last token of many sequences over their cached keys and values, in place.

   A row is one sequence; its sums run over its own positions, oldest first, in blocks of
   BLOCK_KEYS with the largest score so far kept (arXiv:1805.02867), whatever else is computed. */
#include "common.h"

#include <float.h>

enum { LANES = 16, BLOCK_KEYS = 32, MOST_GROUP = 16, MOST_DIM = 256, STRIDE = 64 };

typedef float lanes __attribute__((vector_size(4 * LANES)));

struct decodes {
    const void *query, *keys, *values, *sinks;
    const int64_t *slots, *counts;
    void *output;
    int64_t rows, length, kv_heads, group, dim, value_dim, query_row_stride;
    float scaling, softcap;
    int dtype;
};

/* What one KV head of one row works with: rows of `dim` values filled with zeros up to a multiple
   of STRIDE, so that no loop has a rest. */
struct head {
    float queries[MOST_GROUP * MOST_DIM], sums[MOST_GROUP * MOST_DIM];
    float block[BLOCK_KEYS * MOST_DIM];
    float weights[MOST_GROUP][BLOCK_KEYS];
    float largest[MOST_GROUP], total[MOST_GROUP];
} __attribute__((aligned(64)));

INLINE int64_t filled(int64_t dim) { return (dim + STRIDE - 1) / STRIDE * STRIDE; }

/* Small ones by a polynomial, for beside 1 they would lose their last digits (both: Cephes'
   tanhf). */
INLINE float hyperbolic_tangent(float value) {
    float square = value * value;
    float sum = -5.70498872745e-3f;
    sum = sum * square + 2.06390887954e-2f;
    sum = sum * square - 5.37397155531e-2f;
    sum = sum * square + 1.33314422036e-1f;
    sum = sum * square - 3.33332819422e-1f;
    float small = sum * square * value + value;
    float large = 1.0f - 2.0f / (exponential(2.0f * value) + 1.0f);
    return square < 0.625f * 0.625f ? small : large;
}

INLINE void unpack(const void *from, float *to, int64_t count, int64_t end, int dtype) {
    SIMD for (int64_t i = 0; i < count; i++) to[i] = load(from, i, dtype);
    for (int64_t i = count; i < end; i++)
        to[i] = 0.0f;
}

/* The next block's lines, while this one is computed: no prefetcher follows a block table. */
INLINE void fetch(const char *pages, const int64_t *slots, int64_t count, size_t slot_bytes,
                  size_t offset, size_t bytes) {
    for (int64_t k = 0; k < count; k++)
        for (size_t line = 0; line < bytes; line += 64)
            __builtin_prefetch(pages + (size_t)slots[k] * slot_bytes + offset + line);
}

/* `count` slots' values of one head, as float32. */
INLINE void unpack_block(float *block, const char *pages, const int64_t *slots, int64_t count,
                         size_t slot_bytes, size_t offset, int64_t dim, int dtype) {
    for (int64_t k = 0; k < count; k++)
        unpack(pages + (size_t)slots[k] * slot_bytes + offset, block + k * filled(dim), dim,
               filled(dim), dtype);
}

/* The sum of each of 16 vectors, as one, in the first of them. */
INLINE void sum_each(lanes v[LANES]) {
#define EVEN(a, b)                                                                                 \
    __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define ODD(a, b)                                                                                  \
    __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#define EVEN_PAIRS(a, b)                                                                           \
    __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define ODD_PAIRS(a, b)                                                                            \
    __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN_FOURS(a, b)                                                                           \
    __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define ODD_FOURS(a, b)                                                                            \
    __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define LOW_HALVES(a, b)                                                                           \
    __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HIGH_HALVES(a, b)                                                                          \
    __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
    for (int i = 0; i < 8; i++)
        v[i] = EVEN(v[2 * i], v[2 * i + 1]) + ODD(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; i++)
        v[i] = EVEN_PAIRS(v[2 * i], v[2 * i + 1]) + ODD_PAIRS(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; i++)
        v[i] = EVEN_FOURS(v[2 * i], v[2 * i + 1]) + ODD_FOURS(v[2 * i], v[2 * i + 1]);
    v[0] = LOW_HALVES(v[0], v[1]) + HIGH_HALVES(v[0], v[1]);
}

/* Scores of all of the group's queries for the block's keys. */
INLINE void score_block(struct head *h, int64_t group, int64_t dim, int64_t count,
                        float scaling) {
    int64_t stride = filled(dim);
    for (int64_t g = 0; g < group; g++)
        for (int64_t from = 0; from < count; from += LANES) {
            lanes products[LANES];
            for (int k = 0; k < LANES; k++)
                products[k] = (lanes){0};
            for (int64_t i = 0; i < stride; i += LANES) {
                lanes query = *(const lanes *)(h->queries + g * stride + i);
                for (int k = 0; k < LANES; k++)
                    products[k] += query * *(const lanes *)(h->block + (from + k) * stride + i);
            }
            sum_each(products);
            *(lanes *)(h->weights[g] + from) = products[0] * scaling;
        }
}

/* Scores to weights against the largest so far; the sums shrink where there is a larger one. */
INLINE void weigh_block(struct head *h, int64_t group, int64_t stride, int64_t count,
                        float softcap) {
    for (int64_t g = 0; g < group; g++) {
        float *weights = h->weights[g];
        if (softcap > 0.0f)
            SIMD for (int64_t k = 0; k < BLOCK_KEYS; k++)
                weights[k] = hyperbolic_tangent(weights[k] / softcap) * softcap;
        for (int64_t k = count; k < BLOCK_KEYS; k++)
            weights[k] = -__builtin_inff();
        float top = h->largest[g];
        _Pragma("omp simd reduction(max : top)") for (int64_t k = 0; k < BLOCK_KEYS; k++)
            top = weights[k] > top ? weights[k] : top;
        SIMD for (int64_t k = 0; k < BLOCK_KEYS; k++) weights[k] = exponential(weights[k] - top);
        float sum = 0.0f;
        _Pragma("omp simd reduction(+ : sum)") for (int64_t k = 0; k < BLOCK_KEYS; k++)
            sum += weights[k];
        float shrink = exponential(h->largest[g] - top);
        h->total[g] = h->total[g] * shrink + sum;
        h->largest[g] = top;
        if (shrink != 1.0f)
            SIMD for (int64_t i = 0; i < stride; i++) h->sums[g * stride + i] *= shrink;
    }
}

INLINE void add_block(struct head *h, int64_t group, int64_t stride, int64_t count) {
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < stride; i += STRIDE) {
            lanes *sums = (lanes *)(h->sums + g * stride + i);
            lanes one = sums[0], two = sums[1], three = sums[2], four = sums[3];
            for (int64_t k = 0; k < count; k++) {
                const lanes *value = (const lanes *)(h->block + k * stride + i);
                float weight = h->weights[g][k];
                one += weight * value[0];
                two += weight * value[1];
                three += weight * value[2];
                four += weight * value[3];
            }
            sums[0] = one, sums[1] = two, sums[2] = three, sums[3] = four;
        }
}

/* One KV head of one row: its `group` queries. */
INLINE void attend_head(const struct decodes *d, int64_t row, int64_t kv_head, int dtype) {
    struct head h;
    const int64_t group = d->group, dim = d->dim, value_dim = d->value_dim;
    const int64_t stride = filled(dim), value_stride = filled(value_dim);
    const int64_t *slots = d->slots + row * d->length, all = d->counts[row];
    const size_t key_bytes = (size_t)dim * size_of(dtype);
    const size_t value_bytes = (size_t)value_dim * size_of(dtype);
    const size_t key_slot = key_bytes * (size_t)d->kv_heads, key_at = key_bytes * (size_t)kv_head;
    const size_t value_slot = value_bytes * (size_t)d->kv_heads;
    const size_t value_at = value_bytes * (size_t)kv_head;
    const char *queries =
        (const char *)d->query +
        (size_t)(row * d->query_row_stride + kv_head * group * dim) * size_of(dtype);
    for (int64_t g = 0; g < group; g++) {
        unpack(queries + (size_t)g * key_bytes, h.queries + g * stride, dim, stride, dtype);
        /* Not less, for infinite scores alone have no difference to it. */
        h.largest[g] = d->sinks ? load(d->sinks, kv_head * group + g, dtype) : -FLT_MAX;
        h.total[g] = d->sinks ? 1.0f : 0.0f;
    }
    memset(h.sums, 0, (size_t)(group * value_stride) * sizeof(float));
    /* Keys beyond a short block count for nothing, but are computed with. */
    memset(h.block, 0, (size_t)(BLOCK_KEYS * stride) * sizeof(float));
    memset(h.weights, 0, (size_t)group * sizeof h.weights[0]);
    for (int64_t begin = 0; begin < all; begin += BLOCK_KEYS) {
        int64_t count = all - begin < BLOCK_KEYS ? all - begin : BLOCK_KEYS;
        int64_t next = begin + BLOCK_KEYS;
        int64_t next_count = next >= all ? 0 : all - next < BLOCK_KEYS ? all - next : BLOCK_KEYS;
        unpack_block(h.block, d->keys, slots + begin, count, key_slot, key_at, dim, dtype);
        fetch(d->values, slots + begin, count, value_slot, value_at, value_bytes);
        score_block(&h, group, dim, count, d->scaling);
        weigh_block(&h, group, value_stride, count, d->softcap);
        unpack_block(h.block, d->values, slots + begin, count, value_slot, value_at, value_dim,
                     dtype);
        fetch(d->keys, slots + next, next_count, key_slot, key_at, key_bytes);
        add_block(&h, group, value_stride, count);
    }
    char *output = (char *)d->output +
                   (size_t)((row * d->kv_heads + kv_head) * group) * value_bytes;
    for (int64_t g = 0; g < group; g++) {
        float scale = 1.0f / h.total[g];
        SIMD for (int64_t i = 0; i < value_dim; i++)
            store(output, g * value_dim + i, h.sums[g * value_stride + i] * scale, dtype);
    }
}

INLINE void attend_part_body(void *arguments, int64_t part) {
    const struct decodes *d = arguments;
    if (d->dtype == DTYPE_FLOAT32)
        attend_head(d, part / d->kv_heads, part % d->kv_heads, DTYPE_FLOAT32);
    else
        attend_head(d, part / d->kv_heads, part % d->kv_heads, DTYPE_BFLOAT16);
}

FOR_EACH_PROCESSOR(attend_part, (void *arguments, int64_t part), (arguments, part))

EXPORT int64_t attention_most_group(void) { return MOST_GROUP; }
EXPORT int64_t attention_most_dim(void) { return MOST_DIM; }

/* query [rows, kv_heads, group, dim] (rows query_row_stride values apart) over keys
   [slots, kv_heads, dim] and values [slots, kv_heads, value_dim]: row r sees the first counts[r]
   (1 or more) of slots[r], [rows, length]. softcap 0 is off (Gemma 2, arXiv:2408.00118); sinks
   [kv_heads * group] or NULL: logits that take weight and give nothing.
   output [rows, kv_heads, group, value_dim]. */
EXPORT void attend_decodes(const void *query, const void *keys, const void *values,
                           const void *slots, const void *counts, const void *sinks, void *output,
                           int64_t rows, int64_t length, int64_t kv_heads, int64_t group,
                           int64_t dim, int64_t value_dim, int64_t query_row_stride, float scaling,
                           float softcap, int32_t dtype, int32_t num_threads) {
    struct decodes d = {query, keys,   values,   sinks, slots, counts,    output,
                        rows,  length, kv_heads, group, dim,   value_dim, query_row_stride,
                        scaling, softcap, dtype};
    run_parts(attend_part, &d, rows * kv_heads, num_threads);
}
