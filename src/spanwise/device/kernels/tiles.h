/* Products of few rows with packed weights on AMX tiles: 16 rows of 64 bytes each.

   A weight comes in panels of columns; of each column four bytes stand together (two bfloat16, or
   four int8). 16 such rows of a panel are a step: what one tile of inputs, 64 bytes a row, is
   multiplied with. Four tiles of columns are summed at once, taken from two places. */
#ifndef SPANWISE_TILES_H
#define SPANWISE_TILES_H

#include "common.h"

#if defined(__x86_64__) && defined(__linux__)
#define HAS_TILES 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX                                                                                        \
    __attribute__((target("amx-bf16,amx-int8,amx-tile,avx512f,avx512bw,avx512vl,avx512dq")))
#define TILES static inline __attribute__((always_inline)) AMX

enum {
    TILE_ROWS = 16,
    TILE_BYTES = 64, /* of a row */
    MOST_BLOCKS = 6, /* of rows; with more, oneDNN is faster */
    MOST_TILED_ROWS = MOST_BLOCKS * TILE_ROWS,
    CHUNK_STEPS = 40,
    AHEAD_BYTES = 2048,
};

/* Of four bytes each: float for bfloat16, int32_t for int8. */
typedef uint32_t tile_sums[4][TILE_ROWS][TILE_ROWS];

struct tile_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed));

/* Tiles 0 to 3 are sums and 4 is inputs, of `rows` rows; 5 to 7 are weights. */
static AMX void set_tiles(int64_t rows) {
    struct tile_shapes shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = TILE_BYTES;
        shapes.rows[tile] = (uint8_t)(tile <= 4 ? rows : TILE_ROWS);
    }
    _tile_loadconfig(&shapes);
}

/* Where a weight's next step lies: two tiles side by side at `one`, two at `two`, rows `stride`
   apart; `lines_one` and `lines_two` are 32 lines each, which are the step's all together. */
struct step {
    const char *one, *two, *lines_one, *lines_two;
    size_t stride, bytes; /* bytes: to the step after it, in all of these places */
};

#define TILE_MULTIPLY(is_int8, sums, inputs, weights)                                              \
    do {                                                                                           \
        if (is_int8)                                                                               \
            _tile_dpbusd(sums, inputs, weights);                                                   \
        else                                                                                       \
            _tile_dpbf16ps(sums, inputs, weights);                                                 \
    } while (0)

/* Eight lines, some way ahead. Spread between the tiles: a core has 16 places for lines on their
   way, and waits when it asks for more. */
#define AHEAD(place)                                                                               \
    do {                                                                                           \
        for (int line = 0; line < 8; line++)                                                       \
            _mm_prefetch((place) + AHEAD_BYTES + line * 64, _MM_HINT_T0);                          \
    } while (0)

TILES void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

TILES void load_sums(tile_sums sums) {
    _tile_loadd(0, sums[0], TILE_BYTES);
    _tile_loadd(1, sums[1], TILE_BYTES);
    _tile_loadd(2, sums[2], TILE_BYTES);
    _tile_loadd(3, sums[3], TILE_BYTES);
}

TILES void store_sums(tile_sums sums) {
    _tile_stored(0, sums[0], TILE_BYTES);
    _tile_stored(1, sums[1], TILE_BYTES);
    _tile_stored(2, sums[2], TILE_BYTES);
    _tile_stored(3, sums[3], TILE_BYTES);
}

/* Up to 16 rows, as fast as the weight can be read. */
TILES void multiply_few(struct step at, const char *input, size_t input_stride, int64_t steps,
                        int is_int8, tile_sums sums) {
    zero_sums();
    for (; steps > 0; steps--) {
        _tile_loadd(4, input, input_stride);
        AHEAD(at.lines_one);
        _tile_loadd(5, at.one, at.stride);
        AHEAD(at.lines_two);
        TILE_MULTIPLY(is_int8, 0, 4, 5);
        AHEAD(at.lines_one + 512);
        _tile_loadd(6, at.one + TILE_BYTES, at.stride);
        AHEAD(at.lines_two + 512);
        TILE_MULTIPLY(is_int8, 1, 4, 6);
        AHEAD(at.lines_one + 1024);
        _tile_loadd(7, at.two, at.stride);
        AHEAD(at.lines_two + 1024);
        TILE_MULTIPLY(is_int8, 2, 4, 7);
        AHEAD(at.lines_one + 1536);
        _tile_loadd(5, at.two + TILE_BYTES, at.stride);
        AHEAD(at.lines_two + 1536);
        TILE_MULTIPLY(is_int8, 3, 4, 5);
        at.one += at.bytes, at.two += at.bytes;
        at.lines_one += at.bytes, at.lines_two += at.bytes;
        input += TILE_BYTES;
    }
    store_sums(sums);
}

/* One block of up to 16 rows of more: over `steps` steps, which stay in the second level cache for
   the next block, while `num_lines` lines are fetched with each from lines_one and lines_two. */
TILES void multiply_block(struct step at, const char *input, size_t input_stride, int64_t steps,
                          int64_t num_lines, int is_first, int is_int8, tile_sums sums) {
    if (is_first)
        zero_sums();
    else
        load_sums(sums);
    for (; steps > 0; steps--) {
        _tile_loadd(4, input, input_stride);
        _tile_loadd(5, at.one, at.stride);
        TILE_MULTIPLY(is_int8, 0, 4, 5);
        _tile_loadd(6, at.one + TILE_BYTES, at.stride);
        TILE_MULTIPLY(is_int8, 1, 4, 6);
        for (int64_t line = 0; line < num_lines; line++)
            _mm_prefetch(at.lines_one + line * 64, _MM_HINT_T1);
        _tile_loadd(7, at.two, at.stride);
        TILE_MULTIPLY(is_int8, 2, 4, 7);
        _tile_loadd(5, at.two + TILE_BYTES, at.stride);
        TILE_MULTIPLY(is_int8, 3, 4, 5);
        for (int64_t line = 0; line < num_lines; line++)
            _mm_prefetch(at.lines_two + line * 64, _MM_HINT_T1);
        at.one += at.bytes, at.two += at.bytes;
        at.lines_one += num_lines * 64, at.lines_two += num_lines * 64;
        input += TILE_BYTES;
    }
    store_sums(sums);
}

/* Rows in equal blocks, of which the last overlaps the one before where they do not come out. */
struct blocks {
    int64_t count, rows, all_rows;
};

static inline struct blocks blocks_of(int64_t rows) {
    int64_t count = (rows + TILE_ROWS - 1) / TILE_ROWS;
    struct blocks blocks = {count, (rows + count - 1) / count, rows};
    return blocks;
}

static inline int64_t first_row(struct blocks blocks, int64_t block) {
    return block < blocks.count - 1 ? block * blocks.rows : blocks.all_rows - blocks.rows;
}

/* All rows: sums of block b in sums[b]. Several blocks pass over a chunk of the weight one after the
   other; each fetches its share of the next chunk. */
TILES void multiply_blocks(struct step at, const char *input, size_t input_stride, int64_t steps,
                           struct blocks blocks, int is_int8, tile_sums sums[MOST_BLOCKS]) {
    if (blocks.count == 1) {
        multiply_few(at, input, input_stride, steps, is_int8, sums[0]);
        return;
    }
    int64_t num_lines = (32 + blocks.count - 1) / blocks.count;
    for (int64_t done = 0; done < steps; done += CHUNK_STEPS) {
        int64_t count = steps - done < CHUNK_STEPS ? steps - done : CHUNK_STEPS;
        size_t begin = (size_t)done * at.bytes, end = (size_t)(done + count) * at.bytes;
        for (int64_t block = 0; block < blocks.count; block++) {
            size_t fetched = (size_t)(block * count * num_lines) * 64;
            struct step now = at;
            now.one += begin, now.two += begin;
            /* What lies in one place comes in two halves. */
            now.lines_one = at.one + end + fetched;
            now.lines_two = now.lines_one +
                            (is_int8 ? (size_t)count * at.bytes / 2 : (size_t)(at.two - at.one));
            multiply_block(now,
                           input + (size_t)first_row(blocks, block) * input_stride +
                               (size_t)done * TILE_BYTES,
                           input_stride, count, num_lines, done == 0, is_int8, sums[block]);
        }
    }
}

/* Whether the processor and the system have AMX; asks the system for it, once a process. */
static inline int has_tiles(void) {
    unsigned a, b, c, d;
    const unsigned bf16_tiles = 1u << 22, tiles = 1u << 24, int8_tiles = 1u << 25;
    if (processor_level() != LEVEL_V4 || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    if (!(d & bf16_tiles) || !(d & tiles) || !(d & int8_tiles))
        return 0;
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

#endif
#endif
