/* What happens between the products of a training step, for one core: norms, gates, dropout, the loss, rotary positions.

`plain_rows.py` says what each result must be. Arithmetic is float32 with one rounding at the end; sums and functions
may differ from it in their last places, dropout has its bits. The loops are written once, in native_rows_loops.h, over
vectors of LANES32 numbers, and included here once for each set of instructions. */

#pragma once

#include "native_plain.h"

typedef struct {
    const void *x;      /* (n, width) */
    const void *weight; /* (width,) */
    const void *grad;   /* (n, width), of what the norm gave; backward only */
    void *out;          /* (n, width) */
    float *rstd;        /* (n,): 1 / root mean square */
    int64_t dtype;      /* of x, grad and out */
    int64_t weight_dtype;
    int64_t width;
    int64_t one_plus;   /* the weight is 1 + weight, and nothing is rounded before the end */
    float eps;
} Norm;

typedef struct {
    void *gate;
    void *up;
    void *grad; /* of the product; backward only */
    void *out;  /* forward only */
    int64_t dtype;
    int64_t is_gelu; /* its tanh form; otherwise SiLU */
} Gate;

typedef struct {
    const void *x;
    void *out;
    int64_t dtype;
    int64_t adds; /* to what is in out */
    uint32_t seed;
    uint32_t threshold; /* the smallest hash that is kept */
    float scale;        /* of what is kept */
} Dropout;

typedef struct {
    void *logits;          /* (n, width); become their gradients */
    const int64_t *labels; /* (n,), within width */
    float *below;          /* (n,): largest logit less the label's */
    float *total;          /* (n,): sum of exp(logit - largest); the loss is below + log total */
    float *scratch;        /* (2, width), or (1, width) without a cap; nobody else's while this runs */
    int64_t dtype;
    int64_t width;
    float softcap; /* 0: none */
} Loss;

typedef struct {
    const void *x;   /* (n, heads, width), each head's numbers side by side */
    const void *cos; /* (n, rotated) */
    const void *sin;
    void *out;       /* (n, heads, width) without gaps */
    int64_t dtype;
    int64_t table_dtype; /* of cos and sin */
    int64_t heads;
    int64_t width;
    int64_t rotated;
    int64_t row_stride; /* of x, in elements */
    int64_t head_stride;
    float sign; /* -1 turns back */
} Rotation;

typedef struct {
    const void *q; /* (n, heads, width) without gaps */
    const void *k; /* (n, kv_heads, tokens, width), each token's numbers side by side */
    const void *v;
    void *out;     /* (n, heads, width) */
    float *scores; /* (n, heads, tokens): room */
    int64_t dtype;
    int64_t heads;
    int64_t kv_heads;
    int64_t tokens;
    int64_t width;
    int64_t k_strides[3]; /* of rows, heads and tokens, in elements */
    int64_t v_strides[3];
    float scale;
} Glance;

/* One set of loops, over rows, heads of all rows (glance) or elements (gates, dropout) [first, last). */
typedef struct {
    void (*rms_norm)(const Norm *a, int64_t first, int64_t last);
    void (*rms_norm_backward)(const Norm *a, int64_t first, int64_t last);
    void (*gated)(const Gate *a, int64_t first, int64_t last);
    void (*gated_backward)(const Gate *a, int64_t first, int64_t last);
    void (*dropout)(const Dropout *a, int64_t first, int64_t last);
    void (*cross_entropy)(const Loss *a, int64_t first, int64_t last);
    void (*rope)(const Rotation *a, int64_t first, int64_t last);
    void (*glance)(const Glance *a, int64_t first, int64_t last);
} RowKernels;

static inline int64_t bytes_of(int64_t dtype)
{
    return dtype == FLOAT32 ? 4 : 2;
}

static inline char *at(const void *start, int64_t element, int64_t dtype)
{
    return (char *)start + element * bytes_of(dtype);
}

/* The type is a constant in each copy of a loop. */
#define FOR_EACH_TYPE(loop, a, first, last)             \
    switch ((a)->dtype) {                               \
    case FLOAT32: loop(a, FLOAT32, first, last); break; \
    case FLOAT16: loop(a, FLOAT16, first, last); break; \
    default: loop(a, BFLOAT16, first, last); break;     \
    }

/* ---- plain C ---- */

typedef uint32_t u4 __attribute__((vector_size(16)));
typedef uint16_t h4 __attribute__((vector_size(8)));

static inline f4 choose4(i4 first, f4 a, f4 b)
{
    return (f4)(((i4)a & first) | ((i4)b & ~first));
}

static inline f4 of_halves4(h4 halves)
{
    f4 wide;
    for (int k = 0; k < 4; k++)
        wide[k] = float_of_half(halves[k]);
    return wide;
}

static inline h4 to_halves4(f4 wide)
{
    h4 halves;
    for (int k = 0; k < 4; k++)
        halves[k] = half_of_float(wide[k]);
    return halves;
}

static inline f4 of_bfloats4(h4 halves)
{
    return (f4)(__builtin_convertvector(halves, u4) << 16);
}

static inline h4 to_bfloats4(f4 wide)
{
    u4 bits = (u4)wide, number = (u4)(wide == wide), up = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector((up & number) | (0x7FC0 & ~number), h4);
}

#define SET
#define FN(name) name##_plain_rows
#define LANES32 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define MAX(a, b) choose4((a) > (b), a, b)
#define MIN(a, b) choose4((a) < (b), a, b)
#define OF_HALVES(halves) of_halves4(halves)
#define TO_HALVES(wide) to_halves4(wide)
#define OF_BFLOATS(halves) of_bfloats4(halves)
#define TO_BFLOATS(wide) to_bfloats4(wide)
#include "native_rows_loops.h"

#if defined(__x86_64__)

/* ---- AVX2 ---- */

AVX2 static inline __m256 of_bfloats_avx2(__m128i halves)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

AVX2 static inline __m128i to_bfloats_avx2(__m256 wide)
{
    __m256i words = rounded_avx2(wide, BFLOAT16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

#define SET AVX2
#define FN(name) name##_avx2_rows
#define LANES32 8
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#define OF_HALVES(halves) _mm256_cvtph_ps((__m128i)(halves))
#define TO_HALVES(wide) _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define OF_BFLOATS(halves) of_bfloats_avx2((__m128i)(halves))
#define TO_BFLOATS(wide) to_bfloats_avx2(wide)
#include "native_rows_loops.h"

/* ---- AVX-512 ---- */

AVX512 static inline __m512 of_bfloats_avx512(__m256i halves)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

AVX512 static inline __m256i to_bfloats_avx512(__m512 wide)
{
    return _mm512_cvtepi32_epi16(bfloats_avx512(wide));
}

#define SET AVX512
#define FN(name) name##_avx512_rows
#define LANES32 16
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#define TIMES_POWER(x, n) _mm512_scalef_ps(x, n)
#define OF_HALVES(halves) _mm512_cvtph_ps((__m256i)(halves))
#define TO_HALVES(wide) _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define OF_BFLOATS(halves) of_bfloats_avx512((__m256i)(halves))
#define TO_BFLOATS(wide) to_bfloats_avx512(wide)
#include "native_rows_loops.h"

#endif
