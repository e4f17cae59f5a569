/* What the kernels share: numbers, processors, threads.

   Kernels are plain C with what every processor has; a body is compiled again for newer x86 ones
   (FOR_EACH_PROCESSOR) and picked when it is called. Nothing here knows of Python or torch. */
#ifndef SPANWISE_COMMON_H
#define SPANWISE_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")

typedef uint16_t bf16;

enum { DTYPE_FLOAT32, DTYPE_BFLOAT16 };

/* -- processors ------------------------------------------------------------------------------- */

enum { LEVEL_BASE, LEVEL_V3, LEVEL_V4 };

/* The x86-64 level of this processor, LEVEL_BASE on all others. */
int processor_level(void);

#if defined(__x86_64__)
#define FOR_EACH_PROCESSOR(name, parameters, arguments)                                            \
    __attribute__((target("arch=x86-64-v4"))) static void name##_v4 parameters {                   \
        name##_body arguments;                                                                     \
    }                                                                                              \
    __attribute__((target("arch=x86-64-v3"))) static void name##_v3 parameters {                   \
        name##_body arguments;                                                                     \
    }                                                                                              \
    static void name parameters {                                                                  \
        int level = processor_level();                                                             \
        if (level == LEVEL_V4)                                                                     \
            name##_v4 arguments;                                                                   \
        else if (level == LEVEL_V3)                                                                \
            name##_v3 arguments;                                                                   \
        else                                                                                       \
            name##_body arguments;                                                                 \
    }
#else
#define FOR_EACH_PROCESSOR(name, parameters, arguments)                                            \
    static void name parameters { name##_body arguments; }
#endif

/* -- threads ---------------------------------------------------------------------------------- */

/* Calls work(arguments, part) once for each part below num_parts, on torch's threads if it has any
   (see kernels_use_threads), else one after the other. */
void run_parts(void (*work)(void *arguments, int64_t part), void *arguments, int64_t num_parts,
               int num_threads);

/* -- numbers ---------------------------------------------------------------------------------- */

INLINE float from_bf16(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* To the nearest, ties to even; what is not a number stays none. */
INLINE bf16 to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float load(const void *values, int64_t index, int dtype) {
    return dtype == DTYPE_BFLOAT16 ? from_bf16(((const bf16 *)values)[index])
                                   : ((const float *)values)[index];
}

INLINE void store(void *values, int64_t index, float value, int dtype) {
    if (dtype == DTYPE_BFLOAT16)
        ((bf16 *)values)[index] = to_bf16(value);
    else
        ((float *)values)[index] = value;
}

/* value rounded to the dtype. */
INLINE float rounded(float value, int dtype) {
    return dtype == DTYPE_BFLOAT16 ? from_bf16(to_bf16(value)) : value;
}

INLINE size_t size_of(int dtype) { return dtype == DTYPE_BFLOAT16 ? sizeof(bf16) : sizeof(float); }

/* e to the value, relative error 1e-7; 0 below -87.3, infinite above 88.7. The usual split into a
   power of two and a polynomial (coefficients: Cephes' expf). */
INLINE float exponential(float value) {
    /* In this order, for what is not a number must not reach the integer. */
    float bounded = value > -87.33f ? value : -87.33f;
    bounded = bounded < 89.0f ? bounded : 89.0f;
    float shifted = bounded * 1.44269504088896341f + 12582912.0f; /* rounds to an integer */
    float whole = shifted - 12582912.0f;
    float rest = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    int32_t power = (int32_t)whole;
    /* In two factors: the largest power of two is beyond what one exponent holds. */
    uint32_t half_bits = (uint32_t)((power >> 1) + 127) << 23;
    uint32_t other_bits = (uint32_t)(power - (power >> 1) + 127) << 23;
    float half, other;
    memcpy(&half, &half_bits, sizeof half);
    memcpy(&other, &other_bits, sizeof other);
    float result = sum * half * other;
    result = value < -87.33f ? 0.0f : result;
    return value != value ? value : result;
}

#endif
