/* Few tokens times an int8 weight as oneDNN packs it: panels [out / 64][in / 4][64][4].

   The numbers are those of device/int8.py and oneDNN's kernel, rounding for rounding: a token has
   the same bits in every batch, whoever computes it. */
#include "tiles.h"

enum { INT8_WIDTH = 64, ZERO_POINT = 128, LARGEST = 127 };

struct int8_linear {
    const char *weight;
    const uint8_t *tokens;
    const float *steps;             /* of columns */
    const int32_t *offsets;         /* of columns: ZERO_POINT times their sum */
    const bf16 *token_steps, *bias; /* bias or NULL */
    bf16 *output;
    int64_t rows, in, out, num_panels, num_parts;
};

INLINE void quantize_body(const void *values, uint8_t *tokens, bf16 *steps, int64_t rows,
                          int64_t in, int64_t stride) {
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = (const bf16 *)values + row * stride;
        uint8_t *to = tokens + row * in;
        uint32_t largest = 0; /* bits of what is positive are in the order of what they mean */
        _Pragma("omp simd reduction(max : largest)") for (int64_t i = 0; i < in; i++) {
            uint32_t bits = from[i] & 0x7fffu;
            largest = bits > largest ? bits : largest;
        }
        steps[row] = to_bf16(from_bf16((bf16)largest) / (float)LARGEST);
        float step = from_bf16(steps[row]);
        SIMD for (int64_t i = 0; i < in; i++) {
            float value = from_bf16(from[i]) / step + ((float)ZERO_POINT + 0.5f);
            value = value > 0.0f ? value : 0.0f; /* nor is a token of zeros, 0 / 0, a number */
            to[i] = (uint8_t)(int32_t)(value < 255.0f ? value : 255.0f);
        }
    }
}

FOR_EACH_PROCESSOR(quantize,
                   (const void *values, uint8_t *tokens, bf16 *steps, int64_t rows, int64_t in,
                    int64_t stride),
                   (values, tokens, steps, rows, in, stride))

/* values [rows, in] in bfloat16, rows `stride` values apart, to tokens [rows, in], u8 around 128,
   and each row's step [rows] in bfloat16. */
EXPORT void int8_quantize(const void *values, void *tokens, void *steps, int64_t rows, int64_t in,
                          int64_t stride) {
    quantize(values, tokens, steps, rows, in, stride);
}

#ifdef HAS_TILES

static AMX void finish_panel(const struct int8_linear *l, struct blocks blocks, tile_sums *sums,
                             int64_t panel) {
    for (int64_t block = 0; block < blocks.count; block++)
        for (int tile = 0; tile < 4; tile++) {
            int64_t column = panel * INT8_WIDTH + tile * 16, left = l->out - column;
            int64_t count = left < 16 ? left : 16, row = first_row(blocks, block);
            for (int64_t i = 0; i < blocks.rows; i++) {
                const int32_t *products = (const int32_t *)sums[block][tile][i];
                bf16 *to = l->output + (row + i) * l->out + column;
                float step = from_bf16(l->token_steps[row + i]);
                SIMD for (int64_t c = 0; c < count; c++) {
                    int32_t sum = products[c] - l->offsets[column + c];
                    float value = rounded((float)sum * l->steps[column + c], DTYPE_BFLOAT16);
                    value = rounded(value * step, DTYPE_BFLOAT16);
                    to[c] = to_bf16(l->bias ? value + from_bf16(l->bias[column + c]) : value);
                }
            }
        }
}

static AMX void int8_part(void *arguments, int64_t part) {
    const struct int8_linear *l = arguments;
    tile_sums sums[MOST_BLOCKS];
    struct blocks blocks = blocks_of(l->rows);
    int64_t first = l->num_panels * part / l->num_parts;
    int64_t last = l->num_panels * (part + 1) / l->num_parts;
    set_tiles(blocks.rows);
    for (int64_t panel = first; panel < last; panel++) {
        const char *weight = l->weight + panel * INT8_WIDTH * l->in;
        struct step at = {weight, weight + 128, weight, weight + 2048, 4 * INT8_WIDTH,
                          4 * INT8_WIDTH * TILE_ROWS};
        multiply_blocks(at, (const char *)l->tokens, (size_t)l->in, l->in / 64, blocks, 1, sums);
        finish_panel(l, blocks, sums, panel);
    }
    _tile_release();
}

/* The most rows of int8_linear, 0 where it does not run. */
EXPORT int64_t int8_most_rows(void) { return has_tiles() ? MOST_TILED_ROWS : 0; }

/* tokens [rows, in] times the packed weight, to output [rows, out] in bfloat16; `in` is a multiple
   of 64. steps, offsets [out]; token_steps [rows]. */
EXPORT void int8_linear(const void *weight, const void *tokens, const void *steps,
                        const void *offsets, const void *token_steps, const void *bias,
                        void *output, int64_t rows, int64_t in, int64_t out, int32_t num_threads) {
    struct int8_linear l = {weight, tokens, steps, offsets, token_steps,
                            bias,   output, rows,  in,      out,
                            (out + INT8_WIDTH - 1) / INT8_WIDTH, num_threads < 1 ? 1 : num_threads};
    run_parts(int8_part, &l, l.num_parts, num_threads);
}

#else

EXPORT int64_t int8_most_rows(void) { return 0; }

EXPORT void int8_linear(const void *weight, const void *tokens, const void *steps,
                        const void *offsets, const void *token_steps, const void *bias,
                        void *output, int64_t rows, int64_t in, int64_t out, int32_t num_threads) {
    (void)weight, (void)tokens, (void)steps, (void)offsets, (void)token_steps, (void)bias;
    (void)output, (void)rows, (void)in, (void)out, (void)num_threads;
}

#endif
