/* What the sets of inner loops share, and the set in plain C: any machine, vectors of 16 bytes (SSE2, NEON). */

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MAX_BLOCK 4096
#define MAX_CANDIDATES 64
#define MAX_ROWS 8
#define TILE 4
#define LANES 16
#define TINY 1e-38f

enum { FLOAT32, FLOAT16, BFLOAT16 };

typedef struct {
    float lut[16];       /* value of each code */
    float ascending[16]; /* the same in ascending order */
    float tree[16];      /* the 15 midpoints as a search tree; [0] is not used */
    float midpoints[16]; /* ascending; [15] is not used */
    int32_t order[16];   /* codes in ascending order of their values */
    uint16_t rounded[32]; /* values in bfloat16, times 1 / unit, twice */
    float unit;
} Tables;

typedef struct {
    const void *data; /* n weights */
    int64_t n;
    int64_t block;
    int64_t dtype;
    const Tables *tables;
} Source;

typedef struct {
    const uint8_t *codes;  /* two to a byte, the first in the high nibble */
    const float *absmax;   /* a scale per block, or null: then the four below */
    const uint8_t *absmax8;
    const float *nested;   /* a scale per 256 blocks */
    const float *table8;   /* 256 values */
    float offset;
    int64_t n;
    int64_t block;
    const Tables *tables;
} Packed;

typedef struct {
    const float *wanted;    /* a scale per block */
    const float *nested;
    const float *table8;    /* 256 values, ascending */
    const float *midpoints; /* 255 */
    float offset;
    int64_t neighbours;     /* codes tried on either side of the nearest */
} Nested;

static inline float scale_of(const Packed *p, int64_t block)
{
    if (p->absmax)
        return p->absmax[block];
    float product = p->table8[p->absmax8[block]] * p->nested[block / 256];
    return product + p->offset;
}

/* Some rows of W, each of whole blocks. */
typedef struct {
    const Packed *packed;
    int64_t first;
    int64_t features;
    int64_t in_features;
} Piece;

/* One set of inner loops. w: whole blocks in float32, filled up with zeros; groups: of 16 weights. */
typedef struct {
    void (*widen)(const void *source, int64_t dtype, int64_t n, float *out);
    void (*errors)(const float *w, int64_t groups, const float *scales, int64_t count, const Tables *t, float *errors);
    void (*nearest)(const float *w, int64_t groups, float inverse, const Tables *t, uint8_t *codes);
    void (*decode)(const uint8_t *codes, const float *scales, int64_t blocks, int64_t block, const float *lut,
                   int64_t dtype, void *out);
    float (*dot)(const float *a, const float *b, int64_t n);
    void (*dense)(const void *w, int64_t dtype, int64_t n, const float *x, int64_t stride, int64_t rows, float *sums);
    int64_t lanes; /* of `multiply`; 0: there is none */
    /* sums[feature][row] = row of x times feature */
    void (*multiply)(const Piece *piece, const float *x, int64_t stride, int64_t rows, float *sums);
    /* the same for x in bfloat16, with values in bfloat16; or null */
    void (*multiply16)(const Piece *piece, const uint16_t *x, int64_t stride, int64_t rows, float *sums);
    void (*tile16)(const uint16_t *const *x, const uint16_t *const *w, int64_t n, float (*sums)[TILE]);
} Kernels;

static inline float inverse_of(float scale)
{
    return 1.0f / ((scale < 0 ? -scale : scale) < TINY ? TINY : scale);
}

/* ---- plain C ---- */

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    float magnitude = float_of((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f; /* exact, subnormals too */
    return float_of(sign | ((half & 0x7C00) == 0x7C00 ? 0x7F800000u | (uint32_t)(half & 0x3FF) << 13
                                                     : bits_of(magnitude)));
}

/* Round to nearest, ties to even: the additions do the rounding at the right bit. */
static inline uint16_t half_of_float(float value)
{
    uint32_t bits = bits_of(value), sign = bits & 0x80000000u, twice = bits << 1;
    uint32_t exponent = twice & 0xFF000000u;
    float base = float_of(bits ^ sign) * 0x1p112f * 0x1p-110f; /* overflows to infinity where a half would */
    uint32_t rounded = bits_of(float_of(((exponent < 0x71000000u ? 0x71000000u : exponent) >> 1) + 0x07800000u) + base);
    uint32_t magnitude = ((rounded >> 13) & 0x7C00u) + (rounded & 0xFFFu);
    return (uint16_t)(sign >> 16 | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

static inline uint16_t bfloat_of_float(float value)
{
    uint32_t bits = bits_of(value);
    return value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static void widen_plain(const void *source, int64_t dtype, int64_t n, float *out)
{
    const char *from = source;
    if (dtype == FLOAT32) {
        memcpy(out, source, (size_t)n * 4);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, 2);
        out[i] = dtype == FLOAT16 ? float_of_half(bits) : float_of((uint32_t)bits << 16);
    }
}

/* Bits of the nearest value of each lane: every midpoint passed turns the bits of one value into those of the next. */
static inline f4 nearest4(f4 scaled, const float *midpoints, const uint32_t *steps, uint32_t lowest)
{
    i4 bits = (i4){0} + (int32_t)lowest;
    for (int k = 0; k < 15; k++)
        bits ^= (i4)(scaled > (f4){0} + midpoints[k]) & ((i4){0} + (int32_t)steps[k]);
    return (f4)bits;
}

static void errors_plain(const float *w, int64_t groups, const float *scales, int64_t count, const Tables *t,
                         float *errors)
{
    uint32_t steps[15];
    for (int k = 0; k < 15; k++)
        steps[k] = bits_of(t->ascending[k]) ^ bits_of(t->ascending[k + 1]);
    for (int64_t c = 0; c < count; c++) {
        float inverse = inverse_of(scales[c]), lanes[LANES];
        f4 sums[4] = {{0}, {0}, {0}, {0}};
        for (int64_t g = 0; g < groups; g++)
            for (int q = 0; q < 4; q++) {
                f4 x;
                memcpy(&x, w + 16 * g + 4 * q, 16);
                f4 value = nearest4(x * inverse, t->midpoints, steps, bits_of(t->ascending[0]));
                f4 difference = x - value * scales[c];
                sums[q] += difference * difference;
            }
        memcpy(lanes, sums, sizeof lanes);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++)
                lanes[i] += lanes[i + half];
        errors[c] = lanes[0];
    }
}

static void nearest_plain(const float *w, int64_t groups, float inverse, const Tables *t, uint8_t *codes)
{
    for (int64_t i = 0; i < 16 * groups; i++) {
        float scaled = w[i] * inverse;
        uint32_t node = 1;
        for (int step = 0; step < 4; step++)
            node = 2 * node + (scaled > t->tree[node]);
        codes[i] = (uint8_t)t->order[node - 16];
    }
}

/* 16-bit results of one block; products: its 16 values, rounded. */
static void move16_plain(const uint8_t *codes, int64_t block, const uint16_t *products, char *out)
{
#if defined(__aarch64__) && defined(__AARCH64EL__)
    uint8x16x2_t planes = vld2q_u8((const uint8_t *)products); /* low bytes, high bytes */
    for (int64_t i = 0; i < block; i += 32) {
        uint8x16_t both = vld1q_u8(codes + i / 2);
        uint8x16x2_t nibbles = vzipq_u8(vshrq_n_u8(both, 4), vandq_u8(both, vdupq_n_u8(15)));
        for (int half = 0; half < 2; half++) {
            uint8x16_t low = vqtbl1q_u8(planes.val[0], nibbles.val[half]);
            uint8x16_t high = vqtbl1q_u8(planes.val[1], nibbles.val[half]);
            uint8x16x2_t bytes = {{low, high}};
            vst2q_u8((uint8_t *)out + 2 * i + 32 * half, bytes);
        }
    }
#else
    for (int64_t i = 0; i < block / 2; i++) {
        uint16_t pair[2] = {products[codes[i] >> 4], products[codes[i] & 15]};
        memcpy(out + 4 * i, pair, 4);
    }
#endif
}

static void decode_plain(const uint8_t *codes, const float *scales, int64_t blocks, int64_t block, const float *lut,
                         int64_t dtype, void *out)
{
    char *to = out;
    int64_t width = dtype == FLOAT32 ? 4 : 2;
    for (int64_t b = 0; b < blocks; b++, codes += block / 2, to += block * width) {
        float products[16];
        uint16_t rounded[16];
        for (int k = 0; k < 16; k++) {
            products[k] = lut[k] * scales[b];
            rounded[k] = dtype == FLOAT16 ? half_of_float(products[k]) : bfloat_of_float(products[k]);
        }
        if (dtype != FLOAT32) {
            move16_plain(codes, block, rounded, to);
            continue;
        }
        for (int64_t i = 0; i < block / 2; i++) {
            float pair[2] = {products[codes[i] >> 4], products[codes[i] & 15]};
            memcpy(to + 8 * i, pair, 8);
        }
    }
}

static float dot_plain(const float *a, const float *b, int64_t n)
{
    float lanes[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += a[i + lane] * b[i + lane];
    for (; i < n; i++)
        sum += a[i] * b[i];
    for (int lane = 0; lane < LANES; lane++)
        sum += lanes[lane];
    return sum;
}

/* sums[row] = row of x times w, n numbers of any type, widened some at a time. */
#define DENSE(target, set)                                                                                     \
    target static void dense_##set(const void *w, int64_t dtype, int64_t n, const float *x, int64_t stride,     \
                                   int64_t rows, float *sums)                                                   \
    {                                                                                                           \
        enum { PART = 512 };                                                                                    \
        float values[PART];                                                                                     \
        for (int64_t row = 0; row < rows; row++)                                                                \
            sums[row] = 0;                                                                                      \
        for (int64_t from = 0; from < n; from += PART) {                                                        \
            int64_t count = n - from < PART ? n - from : PART;                                                  \
            widen_##set((const char *)w + from * (dtype == FLOAT32 ? 4 : 2), dtype, count, values);             \
            for (int64_t row = 0; row < rows; row++)                                                            \
                sums[row] += dot_##set(values, x + row * stride + from, count);                                 \
        }                                                                                                       \
    }

DENSE(, plain)

static const Kernels PLAIN = {widen_plain, errors_plain, nearest_plain, decode_plain, dot_plain, dense_plain, 0, 0, 0, 0};
