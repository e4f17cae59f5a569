/* Which processor this is, and whose threads the kernels run on. */
#include "common.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* Which registers the system keeps for a process; the processor must have XSAVE. */
static unsigned kept_registers(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* By hand: __builtin_cpu_supports is not the same in all compilers (zig's knows nothing). */
static int find_level(void) {
    const unsigned v3 = bit_AVX2 | bit_BMI | bit_BMI2, registers_v3 = 0x06;
    const unsigned v4 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
    const unsigned registers_v4 = 0xe6, before = bit_OSXSAVE | bit_FMA | bit_MOVBE;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & before) != before)
        return LEVEL_BASE;
    unsigned kept = kept_registers();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & v3) != v3 ||
        (kept & registers_v3) != registers_v3)
        return LEVEL_BASE;
    return (b & v4) == v4 && (kept & registers_v4) == registers_v4 ? LEVEL_V4 : LEVEL_V3;
}
#else
static int find_level(void) { return LEVEL_BASE; }
#endif

int processor_level(void) {
    static int level = -1;
    int found = __atomic_load_n(&level, __ATOMIC_RELAXED);
    if (found < 0) {
        found = find_level();
        __atomic_store_n(&level, found, __ATOMIC_RELAXED);
    }
    return found;
}

/* Raised with every change of a signature: the library may be older than what calls it. */
EXPORT int64_t kernels_version(void) { return 2; }

/* GOMP_parallel of the OpenMP library that torch has loaded: a second one would have threads of
   its own, and both would spin on the same cores. */
typedef void (*gomp_parallel)(void (*body)(void *), void *data, unsigned num_threads,
                              unsigned flags);
static gomp_parallel threads;

EXPORT void kernels_use_threads(void *parallel) { threads = (gomp_parallel)parallel; }

struct parts {
    void (*work)(void *, int64_t);
    void *arguments;
    int64_t next, count;
};

static void take_parts(void *data) {
    struct parts *parts = data;
    for (;;) {
        int64_t part = __atomic_fetch_add(&parts->next, 1, __ATOMIC_RELAXED);
        if (part >= parts->count)
            return;
        parts->work(parts->arguments, part);
    }
}

void run_parts(void (*work)(void *, int64_t), void *arguments, int64_t num_parts,
               int num_threads) {
    struct parts parts = {work, arguments, 0, num_parts};
    if (threads && num_threads > 1 && num_parts > 1)
        threads(take_parts, &parts, (unsigned)(num_threads < num_parts ? num_threads : num_parts),
                0);
    else
        take_parts(&parts);
}
