/* What a layer does to each row by itself: norms, rotary positions, writing keys and values. */
#include "common.h"

enum { ROWS_PER_PART = 16 };

INLINE int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

/* -- root mean square norm (arXiv:1910.07467) --------------------------------------------------- */

struct norm {
    const void *input, *weight;
    void *output;
    int64_t rows, groups, dim, row_stride, group_stride, output_row_stride, output_group_stride;
    float eps;
    int dtype, weight_dtype;
};

INLINE void norm_row(const struct norm *n, int64_t row, int64_t group, int dtype,
                     int weight_dtype) {
    const char *from = (const char *)n->input +
                       (size_t)(row * n->row_stride + group * n->group_stride) * size_of(dtype);
    char *to = (char *)n->output + (size_t)(row * n->output_row_stride +
                                            group * n->output_group_stride) * size_of(dtype);
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n->dim; i++) {
        float value = load(from, i, dtype);
        sum += value * value;
    }
    float scale = 1.0f / __builtin_sqrtf(sum / (float)n->dim + n->eps);
    /* A weight of the input's dtype is applied after the rounding to it, another before. */
    SIMD for (int64_t i = 0; i < n->dim; i++) {
        float value = load(from, i, dtype) * scale;
        if (weight_dtype == dtype)
            value = rounded(value, dtype);
        store(to, i, value * load(n->weight, i, weight_dtype), dtype);
    }
}

INLINE void norm_part_body(void *arguments, int64_t part) {
    const struct norm *n = arguments;
    int64_t last = smaller(n->rows, (part + 1) * ROWS_PER_PART);
    for (int64_t row = part * ROWS_PER_PART; row < last; row++)
        for (int64_t group = 0; group < n->groups; group++) {
            if (n->dtype == DTYPE_FLOAT32 && n->weight_dtype == DTYPE_FLOAT32)
                norm_row(n, row, group, DTYPE_FLOAT32, DTYPE_FLOAT32);
            else if (n->dtype == DTYPE_FLOAT32)
                norm_row(n, row, group, DTYPE_FLOAT32, DTYPE_BFLOAT16);
            else if (n->weight_dtype == DTYPE_FLOAT32)
                norm_row(n, row, group, DTYPE_BFLOAT16, DTYPE_FLOAT32);
            else
                norm_row(n, row, group, DTYPE_BFLOAT16, DTYPE_BFLOAT16);
        }
}

FOR_EACH_PROCESSOR(norm_part, (void *arguments, int64_t part), (arguments, part))

/* input [rows, groups, dim] to output likewise, over dim, which is contiguous in all; strides in
   values. weight [dim]. */
EXPORT void rms_norm(const void *input, const void *weight, void *output, int64_t rows,
                     int64_t groups, int64_t dim, int64_t row_stride, int64_t group_stride,
                     int64_t output_row_stride, int64_t output_group_stride, float eps,
                     int32_t dtype, int32_t weight_dtype, int32_t num_threads) {
    struct norm n = {input,      weight,       output,            rows,
                     groups,     dim,          row_stride,        group_stride,
                     output_row_stride, output_group_stride, eps, dtype,
                     weight_dtype};
    run_parts(norm_part, &n, (rows + ROWS_PER_PART - 1) / ROWS_PER_PART, num_threads);
}

/* -- rotary positions (arXiv:2104.09864), and where keys and values go ---------------------------- */

struct placing {
    void *heads, *keys, *values;
    const float *cosines, *sines;
    const int64_t *slots;
    int64_t tokens, num_query, num_kv, dim, rotated, token_stride;
    int dtype;
};

/* The first `rotated` of a head, in halves: each pair turned by its angle. The tables hold an angle
   twice, in either half. */
INLINE void rotate(void *head, const float *cosines, const float *sines, int64_t rotated_dim,
                   int dtype) {
    int64_t half = rotated_dim / 2;
    SIMD for (int64_t i = 0; i < half; i++) {
        float first = load(head, i, dtype), second = load(head, half + i, dtype);
        store(head, i, first * cosines[i] - second * sines[i], dtype);
        store(head, half + i, second * cosines[half + i] + first * sines[half + i], dtype);
    }
}

INLINE void place_token(const struct placing *p, int64_t token, int dtype) {
    size_t head_bytes = (size_t)p->dim * size_of(dtype);
    char *heads = (char *)p->heads + (size_t)(token * p->token_stride) * size_of(dtype);
    if (p->rotated) {
        const float *cosines = p->cosines + token * p->rotated;
        const float *sines = p->sines + token * p->rotated;
        for (int64_t head = 0; head < p->num_query + p->num_kv; head++)
            rotate(heads + (size_t)head * head_bytes, cosines, sines, p->rotated, dtype);
    }
    size_t kv_bytes = (size_t)p->num_kv * head_bytes;
    const char *key = heads + (size_t)p->num_query * head_bytes;
    memcpy((char *)p->keys + (size_t)p->slots[token] * kv_bytes, key, kv_bytes);
    memcpy((char *)p->values + (size_t)p->slots[token] * kv_bytes, key + kv_bytes, kv_bytes);
}

INLINE void place_part_body(void *arguments, int64_t part) {
    const struct placing *p = arguments;
    int64_t last = smaller(p->tokens, (part + 1) * ROWS_PER_PART);
    for (int64_t token = part * ROWS_PER_PART; token < last; token++) {
        if (p->dtype == DTYPE_FLOAT32)
            place_token(p, token, DTYPE_FLOAT32);
        else
            place_token(p, token, DTYPE_BFLOAT16);
    }
}

FOR_EACH_PROCESSOR(place_part, (void *arguments, int64_t part), (arguments, part))

/* heads [tokens, num_query + 2 * num_kv, dim], tokens token_stride values apart: queries and keys
   are rotated where they stand (the first `rotated` of each head, 0 for none; cosines and sines
   [tokens, rotated], float32), keys and values copied to slots [tokens] of [slots, num_kv, dim]. */
EXPORT void rotate_and_write(void *heads, const void *cosines, const void *sines,
                             const void *slots, void *keys, void *values, int64_t tokens,
                             int64_t num_query, int64_t num_kv, int64_t dim, int64_t rotated_dim,
                             int64_t token_stride, int32_t dtype, int32_t num_threads) {
    struct placing p = {heads,     keys,   values, cosines,     sines,        slots, tokens,
                        num_query, num_kv, dim,    rotated_dim, token_stride, dtype};
    run_parts(place_part, &p, (tokens + ROWS_PER_PART - 1) / ROWS_PER_PART, num_threads);
}
