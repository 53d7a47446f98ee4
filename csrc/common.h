/* What all sources of the library share: what is exported, types of numbers, limits, and conversions of one number. */

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* Raise this number with every change of a structure, a signature or a meaning that callers rely on, and ABI in
`nybble/kernels/library.py` with it: a library of other sources is then refused when it is loaded. */
#define NYBBLE_ABI 6

#define EXPORT __attribute__((visibility("default")))
#define ALWAYS_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<avx512bf16intrin.h>)
#define HAS_BF16
#endif
#endif

/* Structures that ctypes mirrors have the same size wherever pointers have 8 bytes. */
#define ASSERT_SIZE(Type, bytes)                                                                                       \
    _Static_assert(sizeof(void *) != 8 || sizeof(Type) == (bytes), #Type " is not what its mirror in Python expects")

enum { FLOAT32, FLOAT16, BFLOAT16 };

enum {
    MAX_BLOCK = 4096,    /* weights that share a scale */
    MAX_CANDIDATES = 64, /* scales that the encoder tries for a block */
    MAX_ROWS = 8,        /* of a product straight from the codes */
    MANY_ROWS = 128,     /* of the same in bfloat16 instructions */
    MAX_WIDTH = 256,     /* of an attention head */
};

ALWAYS_INLINE int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}
ALWAYS_INLINE int64_t max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Of one number. */
ALWAYS_INLINE int64_t bytes_of(int64_t dtype)
{
    return dtype == FLOAT32 ? 4 : 2;
}

ALWAYS_INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

ALWAYS_INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

ALWAYS_INLINE float float_of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    float magnitude = float_of((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f; /* exact, subnormals too */
    return float_of(sign |
                    ((half & 0x7C00) == 0x7C00 ? 0x7F800000u | (uint32_t)(half & 0x3FF) << 13 : bits_of(magnitude)));
}

/* Round to nearest, ties to even: the additions do the rounding at the right bit. */
ALWAYS_INLINE uint16_t half_of_float(float value)
{
    uint32_t bits = bits_of(value), sign = bits & 0x80000000u, twice = bits << 1;
    uint32_t exponent = twice & 0xFF000000u;
    float base = float_of(bits ^ sign) * 0x1p112f * 0x1p-110f; /* overflows to infinity where a half would */
    uint32_t rounded = bits_of(float_of(((exponent < 0x71000000u ? 0x71000000u : exponent) >> 1) + 0x07800000u) + base);
    uint32_t magnitude = ((rounded >> 13) & 0x7C00u) + (rounded & 0xFFFu);
    return (uint16_t)(sign >> 16 | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

ALWAYS_INLINE uint16_t bfloat_of_float(float value)
{
    uint32_t bits = bits_of(value);
    return value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* Vectors of 16 bytes, which any machine has (SSE2, NEON). */
typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

/* ---- instruction sets, chosen when the library is loaded: no file needs an -m flag ---- */

enum { ISA_PLAIN, ISA_AVX2, ISA_AVX512, ISA_BF16 };

/* Let the 4-bit and the pointwise operators use this set; `library.c` knows that the machine can run it. */
void ops4bit_use(int isa);
void pointwise_use(int isa);

#if defined(__x86_64__)

#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")))
#define TARGET_BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16")))
#define TARGET_ATTENTION __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

/* Eight products rounded to 16 bits, in the low halves. */
TARGET_AVX2 static inline __m256i rounded_avx2(__m256 products, int64_t dtype)
{
    if (dtype == FLOAT16)
        return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(products, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    __m256i bits = _mm256_castps_si256(products);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(products, products, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), is_nan);
}

/* Sixteen numbers as bfloat16, in the low halves. Rounded with integers: vcvtneps2bf16 takes subnormal numbers for
zeros. */
TARGET_AVX512 static inline __m512i bfloats_avx512(__m512 wide)
{
    __m512i bits = _mm512_castps_si512(wide);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    __mmask16 is_nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(up, is_nan, _mm512_set1_epi32(0x7FC0));
}

#endif
