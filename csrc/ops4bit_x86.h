/* The sets of inner loops for x86-64 with AVX2 and with AVX-512; chosen at run time, so the file needs no -m flag. */

#pragma once

#if defined(__x86_64__)

#include "ops4bit_plain.h"

/* ---- AVX2 ---- */

TARGET_AVX2 static void widen_avx2(const void *source, int64_t dtype, int64_t n, float *out)
{
    const char *from = source;
    int64_t i = 0;
    if (dtype != FLOAT32)
        for (; i + 8 <= n; i += 8) {
            __m128i bits = _mm_loadu_si128((const __m128i *)(from + 2 * i));
            __m256 wide = dtype == FLOAT16 ? _mm256_cvtph_ps(bits)
                                           : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
            _mm256_storeu_ps(out + i, wide);
        }
    widen_plain(from + bytes_of(dtype) * i, dtype, n - i, out + i);
}

/* 2 * node + (scaled > midpoint of node); a permutation reads the low three bits of a node. */
TARGET_AVX2 static inline __m256i child_avx2(__m256i node, __m256 scaled, __m256 midpoints)
{
    __m256 passed = _mm256_cmp_ps(scaled, _mm256_permutevar8x32_ps(midpoints, node), _CMP_GT_OQ);
    return _mm256_sub_epi32(_mm256_slli_epi32(node, 1), _mm256_castps_si256(passed));
}

TARGET_AVX2 static inline __m256i place_avx2(__m256 scaled, __m256 upper_nodes, __m256 leaf_nodes)
{
    __m256i node = child_avx2(_mm256_set1_epi32(1), scaled, upper_nodes);
    node = child_avx2(child_avx2(node, scaled, upper_nodes), scaled, upper_nodes);
    return child_avx2(node, scaled, leaf_nodes); /* low four bits: the rank */
}

/* Entry (low four bits of index) of a table of 16. */
TARGET_AVX2 static inline __m256 look_up_avx2(__m256i index, __m256 low, __m256 high)
{
    __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), is_high);
}

TARGET_AVX2 static inline float halve_sum_avx2(__m256 lanes)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

TARGET_AVX2 static void errors_avx2(const float *w, int64_t groups, const float *scales, int64_t count, const Tables *t,
                                    float *errors)
{
    __m256 upper = _mm256_loadu_ps(t->tree), leaves = _mm256_loadu_ps(t->tree + 8);
    __m256 low = _mm256_loadu_ps(t->ascending), high = _mm256_loadu_ps(t->ascending + 8);
    for (int64_t c = 0; c < count; c++) {
        __m256 scale = _mm256_set1_ps(scales[c]), inverse = _mm256_set1_ps(inverse_of(scales[c]));
        __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t g = 0; g < groups; g++)
            for (int half = 0; half < 2; half++) {
                __m256 x = _mm256_loadu_ps(w + 16 * g + 8 * half);
                __m256i rank = place_avx2(_mm256_mul_ps(x, inverse), upper, leaves);
                __m256 value = _mm256_mul_ps(look_up_avx2(rank, low, high), scale);
                __m256 difference = _mm256_sub_ps(x, value);
                sums[half] = _mm256_add_ps(sums[half], _mm256_mul_ps(difference, difference));
            }
        errors[c] = halve_sum_avx2(_mm256_add_ps(sums[0], sums[1]));
    }
}

TARGET_AVX2 static void nearest_avx2(const float *w, int64_t groups, float inverse, const Tables *t, uint8_t *codes)
{
    __m256 upper = _mm256_loadu_ps(t->tree), leaves = _mm256_loadu_ps(t->tree + 8);
    for (int64_t i = 0; i < 16 * groups; i += 8) {
        int32_t node[8];
        __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(w + i), _mm256_set1_ps(inverse));
        _mm256_storeu_si256((__m256i *)node, place_avx2(scaled, upper, leaves));
        for (int lane = 0; lane < 8; lane++)
            codes[i + lane] = (uint8_t)t->order[node[lane] & 15];
    }
}

/* 16-bit results of one block: low and high bytes are moved apart, 32 codes at a time. */
TARGET_AVX2 static inline void move16_avx2(const uint8_t *codes, int64_t block, __m256i low8, __m256i high8, char *out)
{
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low8, high8), 0xD8);
    __m256i masked = _mm256_and_si256(words, _mm256_set1_epi16(0xFF)), upper = _mm256_srli_epi16(words, 8);
    __m256i planes = _mm256_permute4x64_epi64(_mm256_packus_epi16(masked, upper), 0xD8);
    __m256i low_bytes = _mm256_permute2x128_si256(planes, planes, 0x00);
    __m256i high_bytes = _mm256_permute2x128_si256(planes, planes, 0x11);
    for (int64_t i = 0; i < block; i += 32) {
        __m128i both = _mm_loadu_si128((const __m128i *)(codes + i / 2)), mask = _mm_set1_epi8(15);
        __m128i first = _mm_and_si128(_mm_srli_epi16(both, 4), mask), second = _mm_and_si128(both, mask);
        __m256i nibbles = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
        __m256i low = _mm256_shuffle_epi8(low_bytes, nibbles), high = _mm256_shuffle_epi8(high_bytes, nibbles);
        __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
        _mm256_storeu_si256((__m256i *)(out + 2 * i), _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256((__m256i *)(out + 2 * i + 32), _mm256_permute2x128_si256(even, odd, 0x31));
    }
}

TARGET_AVX2 static void decode_avx2(const uint8_t *codes, const float *scales, int64_t blocks, int64_t block,
                                    const float *lut, int64_t dtype, void *out)
{
    char *to = out;
    for (int64_t b = 0; b < blocks; b++, codes += block / 2, to += block * bytes_of(dtype)) {
        __m256 scale = _mm256_set1_ps(scales[b]);
        __m256 low = _mm256_mul_ps(_mm256_loadu_ps(lut), scale), high = _mm256_mul_ps(_mm256_loadu_ps(lut + 8), scale);
        if (dtype != FLOAT32) {
            move16_avx2(codes, block, rounded_avx2(low, dtype), rounded_avx2(high, dtype), to);
            continue;
        }
        for (int64_t i = 0; i < block; i += 8) {
            int32_t four;
            memcpy(&four, codes + i / 2, 4);
            __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
            __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
            _mm256_storeu_ps((float *)(void *)to + i, look_up_avx2(index, low, high));
        }
    }
}

TARGET_AVX2 static float dot_avx2(const float *a, const float *b, int64_t n)
{
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 4; k++)
            sums[k] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * k), _mm256_loadu_ps(b + i + 8 * k), sums[k]);
    __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    return halve_sum_avx2(sum) + dot_plain(a + i, b + i, n - i);
}

/* The scales of 64 codes, lane by lane; `last`: the last block that there is. */
TARGET_AVX2 static inline __m256 scales_avx2(const Packed *p, int64_t block, int64_t last)
{
    if (p->block >= 64)
        return _mm256_set1_ps(scale_of(p, block));
    __m128 second = _mm_set1_ps(scale_of(p, block < last ? block + 1 : last));
    return _mm256_set_m128(second, _mm_set1_ps(scale_of(p, block)));
}

/* 64 codes, 8 a lane: the value of each is looked up once for all rows of x. x: as `widen` lays it. */
TARGET_AVX2 ALWAYS_INLINE void rows_avx2(const Piece *piece, const float *x, int64_t stride, int rows, float *sums)
{
    const Packed *p = piece->packed;
    __m256 low = _mm256_loadu_ps(p->tables->lut), high = _mm256_loadu_ps(p->tables->lut + 8), totals[MAX_ROWS];
    int shift = __builtin_ctzll((uint64_t)p->block); /* a division would take as long as the rest */
    for (int64_t feature = 0; feature < piece->features; feature++, sums += rows) {
        int64_t start = (piece->first + feature) * piece->in_features, end = start + piece->in_features;
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
            totals[row] = _mm256_setzero_ps();
        for (int64_t at = start; at < end; at += 64) {
            uint8_t rest[32] = {0};
            const uint8_t *from = p->codes + at / 2;
            if (end - at < 64)
                from = memcpy(rest, from, (size_t)(end - at) / 2);
            __m256i codes = _mm256_loadu_si256((const __m256i *)from);
            __m256 scale = scales_avx2(p, at >> shift, (end - 1) >> shift), lanes[MAX_ROWS];
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++)
                lanes[row] = _mm256_setzero_ps();
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++, codes = _mm256_srli_epi32(codes, 4)) {
                __m256 values = look_up_avx2(codes, low, high);
#pragma GCC unroll 8
                for (int row = 0; row < rows; row++) {
                    __m256 columns = _mm256_loadu_ps(x + row * stride + at - start + 8 * j);
                    lanes[row] = _mm256_fmadd_ps(values, columns, lanes[row]);
                }
            }
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++)
                totals[row] = _mm256_fmadd_ps(lanes[row], scale, totals[row]);
        }
        for (int row = 0; row < rows; row++)
            sums[row] = halve_sum_avx2(totals[row]);
    }
}

/* The number of rows is a constant in each copy, so that sums stay in registers. */
#define EACH_NUMBER_OF_ROWS(target, copy)                                                                              \
    target static void copy##_by_number(const Piece *piece, const float *x, int64_t stride, int64_t rows, float *sums) \
    {                                                                                                                  \
        switch (rows) {                                                                                                \
        case 8:                                                                                                        \
            copy(piece, x, stride, 8, sums);                                                                           \
            break;                                                                                                     \
        case 7:                                                                                                        \
            copy(piece, x, stride, 7, sums);                                                                           \
            break;                                                                                                     \
        case 6:                                                                                                        \
            copy(piece, x, stride, 6, sums);                                                                           \
            break;                                                                                                     \
        case 5:                                                                                                        \
            copy(piece, x, stride, 5, sums);                                                                           \
            break;                                                                                                     \
        case 4:                                                                                                        \
            copy(piece, x, stride, 4, sums);                                                                           \
            break;                                                                                                     \
        case 3:                                                                                                        \
            copy(piece, x, stride, 3, sums);                                                                           \
            break;                                                                                                     \
        case 2:                                                                                                        \
            copy(piece, x, stride, 2, sums);                                                                           \
            break;                                                                                                     \
        case 1:                                                                                                        \
            copy(piece, x, stride, 1, sums);                                                                           \
            break;                                                                                                     \
        default:                                                                                                       \
            break;                                                                                                     \
        }                                                                                                              \
    }

EACH_NUMBER_OF_ROWS(TARGET_AVX2, rows_avx2)

DENSE(TARGET_AVX2, avx2)

static const Ops4bitLoops WITH_AVX2 = {widen_avx2, errors_avx2, nearest_avx2,        decode_avx2, dot_avx2,
                                       dense_avx2, 8,           rows_avx2_by_number, 0,           0};

/* ---- AVX-512 ---- */

/* A permutation reads the low four bits of a node, so that nodes 16 to 31 are ranks as they stand. */
TARGET_AVX512 static inline __m512i place_avx512(__m512 scaled, __m512 tree, __m512 root)
{
    __m512i one = _mm512_set1_epi32(1);
    __mmask16 passed = _mm512_cmp_ps_mask(scaled, root, _CMP_GT_OQ);
    __m512i node = _mm512_mask_blend_epi32(passed, _mm512_set1_epi32(2), _mm512_set1_epi32(3));
    for (int step = 0; step < 3; step++) {
        passed = _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(node, tree), _CMP_GT_OQ);
        node = _mm512_add_epi32(node, node);
        node = _mm512_mask_add_epi32(node, passed, node, one);
    }
    return node;
}

TARGET_AVX512 static void errors_avx512(const float *w, int64_t groups, const float *scales, int64_t count,
                                        const Tables *t, float *errors)
{
    __m512 tree = _mm512_loadu_ps(t->tree), root = _mm512_set1_ps(t->tree[1]), values = _mm512_loadu_ps(t->ascending);
    for (int64_t c = 0; c < count; c++) {
        __m512 scale = _mm512_set1_ps(scales[c]), inverse = _mm512_set1_ps(inverse_of(scales[c]));
        __m512 sum = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g++) {
            __m512 x = _mm512_loadu_ps(w + 16 * g);
            __m512i rank = place_avx512(_mm512_mul_ps(x, inverse), tree, root);
            __m512 difference = _mm512_sub_ps(x, _mm512_mul_ps(_mm512_permutexvar_ps(rank, values), scale));
            sum = _mm512_add_ps(sum, _mm512_mul_ps(difference, difference));
        }
        __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sum), 1));
        errors[c] = halve_sum_avx2(_mm256_add_ps(_mm512_castps512_ps256(sum), upper));
    }
}

TARGET_AVX512 static void nearest_avx512(const float *w, int64_t groups, float inverse, const Tables *t, uint8_t *codes)
{
    __m512 tree = _mm512_loadu_ps(t->tree), root = _mm512_set1_ps(t->tree[1]);
    __m512i order = _mm512_loadu_si512(t->order);
    for (int64_t g = 0; g < groups; g++) {
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(w + 16 * g), _mm512_set1_ps(inverse));
        __m512i chosen = _mm512_permutexvar_epi32(place_avx512(scaled, tree, root), order);
        _mm_storeu_si128((__m128i *)(codes + 16 * g), _mm512_cvtepi32_epi8(chosen));
    }
}

/* The 16 products of a block in 16 bits, twice: a permutation of 32 words takes five bits of its index. */
TARGET_AVX512 static inline __m512i rounded_avx512(__m512 products, int64_t dtype)
{
    if (dtype == FLOAT16)
        return _mm512_broadcast_i64x4(_mm512_cvtps_ph(products, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(bfloats_avx512(products)));
}

TARGET_AVX512 static void decode_avx512(const uint8_t *codes, const float *scales, int64_t blocks, int64_t block,
                                        const float *lut, int64_t dtype, void *out)
{
    __m512 values = _mm512_loadu_ps(lut);
    char *to = out;
    for (int64_t b = 0; b < blocks; b++, codes += block / 2) {
        __m512 products = _mm512_mul_ps(values, _mm512_set1_ps(scales[b]));
        if (dtype == FLOAT32) {
            for (int64_t i = 0; i < block; i += 16, to += 64) {
                __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + i / 2)));
                __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
                _mm512_storeu_ps(to, _mm512_permutexvar_ps(index, products));
            }
            continue;
        }
        __m512i rounded = rounded_avx512(products, dtype);
        for (int64_t i = 0; i < block; i += 32, to += 64) {
            __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index, rounded));
        }
    }
}

TARGET_AVX512 static float dot_avx512(const float *a, const float *b, int64_t n)
{
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int k = 0; k < 4; k++)
            sums[k] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * k), _mm512_loadu_ps(b + i + 16 * k), sums[k]);
    __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    return _mm512_reduce_add_ps(sum) + dot_plain(a + i, b + i, n - i);
}

/* Sixteen numbers of any type. */
TARGET_AVX512 ALWAYS_INLINE __m512 wide_avx512(const char *from, int64_t dtype)
{
    if (dtype == FLOAT32)
        return _mm512_loadu_ps(from);
    __m256i bits = _mm256_loadu_si256((const __m256i *)from);
    return dtype == FLOAT16 ? _mm512_cvtph_ps(bits)
                            : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* The same of `left` numbers, and zeros. */
TARGET_AVX512 ALWAYS_INLINE __m512 some_avx512(const char *from, int64_t dtype, int64_t left)
{
    __mmask16 present = left < 16 ? (__mmask16)((1u << left) - 1) : 0xFFFF;
    if (dtype == FLOAT32)
        return _mm512_maskz_loadu_ps(present, from);
    char halves[32] = {0};
    memcpy(halves, from, (size_t)(left < 16 ? left : 16) * 2);
    return wide_avx512(halves, dtype);
}

TARGET_AVX512 ALWAYS_INLINE void numbers_avx512(const char *w, int64_t dtype, int64_t n, const float *x, int64_t stride,
                                                int rows, float *sums)
{
    enum { AHEAD = 4096 };
    int64_t i = 0, width = bytes_of(dtype);
    __m512 lanes[2 * MAX_ROWS];
#pragma GCC unroll 16
    for (int part = 0; part < 2 * rows; part++)
        lanes[part] = _mm512_setzero_ps();
    for (; i + 32 <= n; i += 32) {
        __m512 first = wide_avx512(w + i * width, dtype), second = wide_avx512(w + (i + 16) * width, dtype);
        _mm_prefetch(w + i * width + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            const float *columns = x + row * stride + i;
            lanes[2 * row] = _mm512_fmadd_ps(first, _mm512_loadu_ps(columns), lanes[2 * row]);
            lanes[2 * row + 1] = _mm512_fmadd_ps(second, _mm512_loadu_ps(columns + 16), lanes[2 * row + 1]);
        }
    }
    for (; i < n; i += 16) { /* at most two */
        __m512 rest = some_avx512(w + i * width, dtype, n - i);
        __mmask16 present = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : 0xFFFF;
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            __m512 columns = _mm512_maskz_loadu_ps(present, x + row * stride + i);
            lanes[2 * row] = _mm512_fmadd_ps(rest, columns, lanes[2 * row]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        sums[row] = _mm512_reduce_add_ps(_mm512_add_ps(lanes[2 * row], lanes[2 * row + 1]));
}

TARGET_AVX512 static void dense_avx512(const void *w, int64_t dtype, int64_t n, const float *x, int64_t stride,
                                       int64_t rows, float *sums)
{
    for (; rows > 0; rows -= 4, x += 4 * stride, sums += 4) {
        int some = rows < 4 ? (int)rows : 4;
        if (dtype == BFLOAT16 && some == 1)
            numbers_avx512(w, BFLOAT16, n, x, stride, 1, sums);
        else if (dtype == FLOAT32 && some == 1)
            numbers_avx512(w, FLOAT32, n, x, stride, 1, sums);
        else if (some == 1)
            numbers_avx512(w, dtype, n, x, stride, 1, sums);
        else if (some == 2)
            numbers_avx512(w, dtype, n, x, stride, 2, sums);
        else if (some == 3)
            numbers_avx512(w, dtype, n, x, stride, 3, sums);
        else
            numbers_avx512(w, dtype, n, x, stride, 4, sums);
    }
}

#endif
