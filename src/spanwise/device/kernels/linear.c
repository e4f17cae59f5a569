/* Products of few rows with a weight as oneDNN packs it, at the speed the weight can be read.

   oneDNN lays a bfloat16 weight [out, in] out in panels, [out / width][in / 2][width][2]. With few
   rows all that takes time is reading them: what is here reads two places of a panel list at once
   and asks for every line ahead of its use, which the prefetchers alone do not do across pages.

   Sums are in float32. What follows a product (bias, activation, a sum or a product with other
   values) is done before the one rounding. */
#include "common.h"

enum { ACTIVATION_NONE, ACTIVATION_SWISH, ACTIVATION_RELU, ACTIVATION_GELU_TANH };
enum { COMBINE_NONE, COMBINE_ADD, COMBINE_MULTIPLY };

struct linear {
    const bf16 *weight, *input, *bias, *other;
    bf16 *output;
    int64_t rows, in, out, input_stride, other_stride;
    int activation, combine;
    int64_t num_panels, num_parts;
};

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

INLINE float activated(float value, int activation) {
    switch (activation) {
    case ACTIVATION_SWISH:
        return value / (1.0f + exponential(-value));
    case ACTIVATION_RELU:
        return value > 0.0f ? value : 0.0f;
    case ACTIVATION_GELU_TANH: {
        float inner = 0.7978845608028654f * (value + 0.044715f * value * value * value);
        return value - value / (1.0f + exponential(2.0f * inner));
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

/* -- AMX: tiles of 16 rows by 64 bytes; panels of 32 columns ----------------------------------- */

#define AMX __attribute__((target("amx-bf16,amx-tile,avx512f,avx512bw,avx512vl,avx512dq")))

enum {
    AMX_WIDTH = 32,
    AMX_MOST_BLOCKS = 6,
    AMX_MOST_ROWS = AMX_MOST_BLOCKS * 16,
    CHUNK_STEPS = 40,
    AMX_STEP_BYTES = AMX_WIDTH * 32 * 2, /* of a panel: 32 inputs, one tile deep */
    AHEAD_BYTES = 2048,
};

struct tile_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed));

static AMX void set_tiles(int rows) {
    struct tile_shapes shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = (uint8_t)(tile <= 4 ? rows : 16); /* sums, input; then weights */
    }
    _tile_loadconfig(&shapes);
}

/* Eight lines, some way ahead. Spread between the tiles: a core has 16 places for lines on their
   way, and waits when it asks for more. */
#define AHEAD(place)                                                                               \
    do {                                                                                           \
        for (int line = 0; line < 8; line++)                                                       \
            _mm_prefetch((place) + AHEAD_BYTES + line * 64, _MM_HINT_T0);                          \
    } while (0)

static AMX void finish_tile(const struct linear *l, float sums[16][16], int rows, int64_t row,
                            int64_t column) {
    if (column < l->out)
        finish(l, sums[0], rows, row, column, 16);
}

/* Up to 16 rows, two panels at once. */
static AMX void two_panels(const struct linear *l, int64_t one, int64_t two) {
    const char *first = (const char *)(l->weight + one * AMX_WIDTH * l->in);
    const char *second = (const char *)(l->weight + two * AMX_WIDTH * l->in);
    const bf16 *input = l->input;
    size_t stride = (size_t)l->input_stride * sizeof(bf16);
    float sums[4][16][16];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = l->in / 32; step > 0; step--) {
        _tile_loadd(4, input, stride);
        AHEAD(first);
        _tile_loadd(5, first, 128);
        AHEAD(second);
        _tile_dpbf16ps(0, 4, 5);
        AHEAD(first + 512);
        _tile_loadd(6, first + 64, 128);
        AHEAD(second + 512);
        _tile_dpbf16ps(1, 4, 6);
        AHEAD(first + 1024);
        _tile_loadd(7, second, 128);
        AHEAD(second + 1024);
        _tile_dpbf16ps(2, 4, 7);
        AHEAD(first + 1536);
        _tile_loadd(5, second + 64, 128);
        AHEAD(second + 1536);
        _tile_dpbf16ps(3, 4, 5);
        first += AMX_STEP_BYTES;
        second += AMX_STEP_BYTES;
        input += 32;
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    int rows = (int)l->rows;
    finish_tile(l, sums[0], rows, 0, one * AMX_WIDTH);
    finish_tile(l, sums[1], rows, 0, one * AMX_WIDTH + 16);
    if (two == one)
        return;
    finish_tile(l, sums[2], rows, 0, two * AMX_WIDTH);
    finish_tile(l, sums[3], rows, 0, two * AMX_WIDTH + 16);
}

/* More rows in blocks of up to 16. A unit of two panels, CHUNK_STEPS deep, stays in the second
   level cache while one block after another passes over it; meanwhile the next one is fetched, a
   share with each block. */
struct unit {
    const char *first, *second, *next_first, *next_second;
    int64_t steps, lines; /* lines: of the next unit's panels, with each step */
    int is_first;         /* of its panels: sums begin at zero */
};

static AMX void pass(const struct unit *unit, const bf16 *input, size_t stride,
                     float sums[4][16][16]) {
    const char *first = unit->first, *second = unit->second;
    const char *next_first = unit->next_first, *next_second = unit->next_second;
    if (unit->is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums[0], 64);
        _tile_loadd(1, sums[1], 64);
        _tile_loadd(2, sums[2], 64);
        _tile_loadd(3, sums[3], 64);
    }
    for (int64_t step = unit->steps; step > 0; step--) {
        _tile_loadd(4, input, stride);
        _tile_loadd(5, first, 128);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, first + 64, 128);
        _tile_dpbf16ps(1, 4, 6);
        for (int64_t line = 0; line < unit->lines; line++)
            _mm_prefetch(next_first + line * 64, _MM_HINT_T1);
        _tile_loadd(7, second, 128);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, second + 64, 128);
        _tile_dpbf16ps(3, 4, 5);
        for (int64_t line = 0; line < unit->lines; line++)
            _mm_prefetch(next_second + line * 64, _MM_HINT_T1);
        first += AMX_STEP_BYTES;
        second += AMX_STEP_BYTES;
        next_first += unit->lines * 64;
        next_second += unit->lines * 64;
        input += 32;
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}

static AMX void panels_in_blocks(const struct linear *l, int64_t first, int64_t last,
                                 int num_blocks, int rows) {
    float sums[AMX_MOST_BLOCKS][4][16][16];
    size_t stride = (size_t)l->input_stride * sizeof(bf16);
    int64_t panel_bytes = AMX_WIDTH * l->in * (int64_t)sizeof(bf16), half = (last - first + 1) / 2;
    int64_t all_steps = l->in / 32;
    struct unit unit;
    unit.lines = (32 + num_blocks - 1) / num_blocks;
    for (int64_t panel = first; panel < first + half; panel++) {
        int64_t other = panel + half < last ? panel + half : panel;
        for (int64_t at = 0; at < all_steps; at += CHUNK_STEPS) {
            unit.is_first = at == 0;
            unit.steps = all_steps - at < CHUNK_STEPS ? all_steps - at : CHUNK_STEPS;
            unit.first = (const char *)l->weight + panel * panel_bytes + at * AMX_STEP_BYTES;
            unit.second = (const char *)l->weight + other * panel_bytes + at * AMX_STEP_BYTES;
            for (int block = 0; block < num_blocks; block++) {
                int64_t row = block < num_blocks - 1 ? block * rows : l->rows - rows;
                int64_t ahead = unit.steps * AMX_STEP_BYTES + block * unit.steps * unit.lines * 64;
                unit.next_first = unit.first + ahead;
                unit.next_second = unit.second + ahead;
                pass(&unit, l->input + row * l->input_stride + at * 32, stride, sums[block]);
            }
        }
        for (int block = 0; block < num_blocks; block++) {
            int64_t row = block < num_blocks - 1 ? block * rows : l->rows - rows;
            finish_tile(l, sums[block][0], rows, row, panel * AMX_WIDTH);
            finish_tile(l, sums[block][1], rows, row, panel * AMX_WIDTH + 16);
            if (other == panel)
                continue;
            finish_tile(l, sums[block][2], rows, row, other * AMX_WIDTH);
            finish_tile(l, sums[block][3], rows, row, other * AMX_WIDTH + 16);
        }
    }
}

static AMX void amx_part(void *arguments, int64_t part) {
    const struct linear *l = arguments;
    int64_t first, last;
    part_of(l, part, &first, &last);
    if (l->rows <= 16) {
        set_tiles((int)l->rows);
        int64_t half = (last - first + 1) / 2;
        for (int64_t panel = first; panel < first + half; panel++)
            two_panels(l, panel, panel + half < last ? panel + half : panel);
    } else {
        int num_blocks = (int)(l->rows + 15) / 16;
        int rows = (int)(l->rows + num_blocks - 1) / num_blocks;
        set_tiles(rows);
        panels_in_blocks(l, first, last, num_blocks, rows);
    }
    _tile_release();
}

/* Whether the processor and the system have AMX; asks the system for it, once a process. */
static int has_amx(void) {
    unsigned a, b, c, d;
    if (processor_level() != LEVEL_V4 || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    if (!(d & 1u << 22) || !(d & 1u << 24)) /* AMX-BF16, AMX-TILE */
        return 0;
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
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
    if (width == AMX_WIDTH && has_amx())
        return AMX_MOST_ROWS;
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
