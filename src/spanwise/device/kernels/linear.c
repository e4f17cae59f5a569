/* Products of few rows with a weight as oneDNN packs it, at the speed the weight can be read.

   oneDNN lays a bfloat16 weight [out, in] out in panels, [out / width][in / 2][width][2]. With few
   rows all that takes time is reading them: what is here reads two places of a panel list at once
   and asks for every line ahead of its use, which the prefetchers alone do not do across pages.

   Sums are in float32. What follows a product (bias, activation, a sum or a product with other
   values) is done before the one rounding. */
#include "tiles.h"

enum { ACTIVATION_NONE, ACTIVATION_SWISH, ACTIVATION_RELU, ACTIVATION_GELU_TANH };
enum { COMBINE_NONE, COMBINE_ADD, COMBINE_MULTIPLY };

struct linear {
    const bf16 *weight, *input, *bias, *other;
    bf16 *output;
    int64_t rows, in, out, input_stride, other_stride;
    int activation, combine;
    int64_t num_panels, num_parts;
};

#ifdef HAS_TILES

INLINE float activated(float value, int activation) {
    switch (activation) {
    case ACTIVATION_SWISH:
        return value / (1.0f + exponential(-value));
    case ACTIVATION_RELU:
        return value < 0.0f ? 0.0f : value; /* what is not a number stays none */
    case ACTIVATION_GELU_TANH: {
        float inner = 0.7978845608028654f * (value + 0.044715f * value * value * value);
        return value / (1.0f + exponential(-2.0f * inner));
    }
    default:
        return value;
    }
}

/* `rows` rows from `row` on of up to `most` columns from `column` on: sums (a row `most` long) to
   values. `activation` and `combine` are constants where it is called. */
INLINE void finish_as(const struct linear *l, const float *sums, int64_t rows, int64_t row,
                      int64_t column, int64_t most, int activation, int combine) {
    int64_t count = l->out - column < most ? l->out - column : most;
    const bf16 *bias = l->bias ? l->bias + column : NULL;
    for (int64_t end = row + rows; row < end; row++, sums += most) {
        bf16 *to = l->output + row * l->out + column;
        const bf16 *other = l->other ? l->other + row * l->other_stride + column : NULL;
        float values[64];
        memcpy(values, sums, (size_t)most * sizeof(float));
        if (bias)
            for (int64_t i = 0; i < count; i++)
                values[i] += from_bf16(bias[i]);
        if (count == most) /* a loop of known length */
            count = most;
        SIMD for (int64_t i = 0; i < count; i++) {
            float value = activated(values[i], activation);
            if (combine == COMBINE_ADD)
                value += from_bf16(other[i]);
            if (combine == COMBINE_MULTIPLY)
                value *= from_bf16(other[i]);
            to[i] = to_bf16(value);
        }
    }
}

INLINE void finish(const struct linear *l, const float *sums, int64_t rows, int64_t row,
                   int64_t column, int64_t most) {
/* A loop for each, which the compiler can turn to vectors. */
#define FINISH(activation, combine)                                                                \
    finish_as(l, sums, rows, row, column, most, activation, combine)
    if (l->combine == COMBINE_ADD)
        FINISH(ACTIVATION_NONE, COMBINE_ADD);
    else if (l->combine == COMBINE_MULTIPLY)
        FINISH(ACTIVATION_NONE, COMBINE_MULTIPLY);
    else if (l->activation == ACTIVATION_SWISH)
        FINISH(ACTIVATION_SWISH, COMBINE_NONE);
    else if (l->activation == ACTIVATION_RELU)
        FINISH(ACTIVATION_RELU, COMBINE_NONE);
    else if (l->activation == ACTIVATION_GELU_TANH)
        FINISH(ACTIVATION_GELU_TANH, COMBINE_NONE);
    else
        FINISH(ACTIVATION_NONE, COMBINE_NONE);
#undef FINISH
}

/* The panels of a part: [first, last). */
static inline void part_of(const struct linear *l, int64_t part, int64_t *first, int64_t *last) {
    *first = l->num_panels * part / l->num_parts;
    *last = l->num_panels * (part + 1) / l->num_parts;
}

/* -- AMX: panels of 32 columns ------------------------------------------------------------------- */

enum { AMX_WIDTH = 32 };

/* The columns of panels `one` and `two`, of all rows. */
static AMX void finish_panels(const struct linear *l, struct blocks blocks, tile_sums *sums,
                              int64_t one, int64_t two) {
    for (int64_t block = 0; block < blocks.count; block++)
        for (int tile = 0; tile < (one == two ? 2 : 4); tile++) {
            int64_t column = (tile < 2 ? one : two) * AMX_WIDTH + (tile & 1) * 16;
            if (column < l->out)
                finish(l, (const float *)sums[block][tile], blocks.rows, first_row(blocks, block),
                       column, 16);
        }
}

static AMX void amx_part(void *arguments, int64_t part) {
    const struct linear *l = arguments;
    tile_sums sums[MOST_BLOCKS];
    struct blocks blocks = blocks_of(l->rows);
    const char *weight = (const char *)l->weight;
    int64_t first, last, panel_bytes = AMX_WIDTH * l->in * (int64_t)sizeof(bf16);
    part_of(l, part, &first, &last);
    set_tiles(blocks.rows);
    int64_t half = (last - first + 1) / 2;
    for (int64_t panel = first; panel < first + half; panel++) {
        int64_t other = panel + half < last ? panel + half : panel;
        const char *one = weight + panel * panel_bytes, *two = weight + other * panel_bytes;
        struct step at = {one, two, one, two, 4 * AMX_WIDTH, 4 * AMX_WIDTH * TILE_ROWS};
        multiply_blocks(at, (const char *)l->input, (size_t)l->input_stride * sizeof(bf16),
                        l->in / 32, blocks, 0, sums);
        finish_panels(l, blocks, sums, panel, other);
    }
    _tile_release();
}

/* -- AVX512-BF16: pairs of products; panels of 64 columns -------------------------------------- */

#define DOT __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq")))

enum { DOT_WIDTH = 64, DOT_MOST_ROWS = 4, DOT_PAIR_BYTES = DOT_WIDTH * 4 };

#define DOT_ROWS(count)                                                                            \
    static DOT void dot_##count(const struct linear *l, int64_t panel) {                           \
        const char *weight = (const char *)(l->weight + panel * DOT_WIDTH * l->in);                \
        __m512 sums[count][4];                                                                     \
        for (int row = 0; row < count; row++)                                                      \
            for (int i = 0; i < 4; i++)                                                            \
                sums[row][i] = _mm512_setzero_ps();                                                \
        for (int64_t input = 0; input < l->in; input += 2) {                                       \
            for (int i = 0; i < 4; i++)                                                            \
                _mm_prefetch(weight + AHEAD_BYTES + i * 64, _MM_HINT_T0);                          \
            for (int row = 0; row < count; row++) {                                                \
                int32_t pair;                                                                      \
                memcpy(&pair, l->input + row * l->input_stride + input, sizeof pair);              \
                __m512bh values = (__m512bh)_mm512_set1_epi32(pair);                               \
                for (int i = 0; i < 4; i++)                                                        \
                    sums[row][i] = _mm512_dpbf16_ps(                                               \
                        sums[row][i], (__m512bh)_mm512_loadu_si512(weight + i * 64), values);      \
            }                                                                                      \
            weight += DOT_PAIR_BYTES;                                                              \
        }                                                                                          \
        finish(l, (const float *)sums, count, 0, panel *DOT_WIDTH, DOT_WIDTH);                     \
    }

DOT_ROWS(1)
DOT_ROWS(2)
DOT_ROWS(3)
DOT_ROWS(4)

static DOT void dot_part(void *arguments, int64_t part) {
    const struct linear *l = arguments;
    int64_t first, last;
    part_of(l, part, &first, &last);
    for (int64_t panel = first; panel < last; panel++) {
        if (l->rows == 1)
            dot_1(l, panel);
        else if (l->rows == 2)
            dot_2(l, panel);
        else if (l->rows == 3)
            dot_3(l, panel);
        else
            dot_4(l, panel);
    }
}

static int has_dot(void) {
    unsigned a, b, c, d;
    if (processor_level() != LEVEL_V4 || !__get_cpuid_count(7, 1, &a, &b, &c, &d))
        return 0;
    return (a & 1u << 5) != 0; /* AVX512_BF16 */
}

/* With panels of `width` columns: the most rows of a product, 0 where there is none for them. */
EXPORT int64_t linear_most_rows(int64_t width) {
    if (width == AMX_WIDTH && has_tiles())
        return MOST_TILED_ROWS;
    if (width == DOT_WIDTH && has_dot())
        return DOT_MOST_ROWS;
    return 0;
}

/* input [rows, in] (rows input_stride apart) times the packed weight, to output [rows, out].
   `in` is a multiple of 32; `bias` [out] or NULL. An activation, or `other` [rows, out] to be
   combined with, not both. */
EXPORT void linear(const void *weight, int64_t width, const void *input, int64_t input_stride,
                   const void *bias, const void *other, int64_t other_stride, void *output,
                   int64_t rows, int64_t in, int64_t out, int32_t activation, int32_t combine,
                   int32_t num_threads) {
    struct linear l = {weight, input, bias,  other,        output,       rows,       in,
                       out,    input_stride, other_stride, activation,   combine,
                       (out + width - 1) / width,          num_threads < 1 ? 1 : num_threads};
    run_parts(width == AMX_WIDTH ? amx_part : dot_part, &l, l.num_parts, num_threads);
}

#else

EXPORT int64_t linear_most_rows(int64_t width) {
    (void)width;
    return 0;
}

EXPORT void linear(const void *weight, int64_t width, const void *input, int64_t input_stride,
                   const void *bias, const void *other, int64_t other_stride, void *output,
                   int64_t rows, int64_t in, int64_t out, int32_t activation, int32_t combine,
                   int32_t num_threads) {
    (void)weight, (void)width, (void)input, (void)input_stride, (void)bias, (void)other;
    (void)other_stride, (void)output, (void)rows, (void)in, (void)out, (void)activation;
    (void)combine, (void)num_threads;
}

#endif
