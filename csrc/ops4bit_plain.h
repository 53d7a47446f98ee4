/* The set of inner loops in plain C, for any machine, and what the sets share. */

#pragma once

#include "ops4bit.h"

static inline float scale_of(const Packed *p, int64_t block)
{
    if (p->absmax)
        return p->absmax[block];
    float product = p->table8[p->absmax8[block]] * p->nested[block / 256];
    return product + p->offset;
}

static inline float inverse_of(float scale)
{
    return 1.0f / ((scale < 0 ? -scale : scale) < TINY ? TINY : scale);
}

/* ---- plain C ---- */

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
    int64_t width = bytes_of(dtype);
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
#define DENSE(target, set)                                                                                             \
    target static void dense_##set(const void *w, int64_t dtype, int64_t n, const float *x, int64_t stride,            \
                                   int64_t rows, float *sums)                                                          \
    {                                                                                                                  \
        enum { PART = 512 };                                                                                           \
        float values[PART];                                                                                            \
        for (int64_t row = 0; row < rows; row++)                                                                       \
            sums[row] = 0;                                                                                             \
        for (int64_t from = 0; from < n; from += PART) {                                                               \
            int64_t count = n - from < PART ? n - from : PART;                                                         \
            widen_##set((const char *)w + from * bytes_of(dtype), dtype, count, values);                               \
            for (int64_t row = 0; row < rows; row++)                                                                   \
                sums[row] += dot_##set(values, x + row * stride + from, count);                                        \
        }                                                                                                              \
    }

DENSE(, plain)

static const Ops4bitLoops PLAIN = {
    widen_plain, errors_plain, nearest_plain, decode_plain, dot_plain, dense_plain, 0, 0, 0, 0};
