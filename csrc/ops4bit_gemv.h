/* x W^T for a few rows of x, straight from the codes, with AVX-512; chosen at run time.

128 codes lie in a register, 8 to a lane; each shift brings up the next of every lane (or, of bfloat16, of both
halves of it), whose values a permutation looks up for all rows of x. `widen_inputs` in ops4bit.c lays x in that order.
Sums are float32. In bfloat16 the values are rounded (see `Tables`), once for all weights; scales are not. */

#pragma once

#include "ops4bit_x86.h"

#if defined(__x86_64__)

/* Scales of `per_group` blocks beside each other, lane by lane. All by loads, which cost nothing beside permutations,
and made while codes are under way from memory: read ahead for many rows, nothing would be under way meanwhile. */
TARGET_AVX512 ALWAYS_INLINE __m512 spread_avx512(const float *table, const int64_t *places, int per_group)
{
    static const __mmask16 halves[] = {0xFFFF, 0xFF00}, quarters[] = {0xFFFF, 0x00F0, 0x0F00, 0xF000};
    const __mmask16 *masks = per_group == 4 ? quarters : halves;
    __m512 spread = _mm512_set1_ps(table[places[0]]);
#pragma GCC unroll 4
    for (int i = 1; i < per_group; i++)
        spread = _mm512_mask_broadcastss_ps(spread, masks[i], _mm_load_ss(table + places[i]));
    return spread;
}

/* `there`: how many of these blocks there are. */
TARGET_AVX512 ALWAYS_INLINE __m512 scales_avx512(const Packed *p, int64_t block, int there, int per_group,
                                                 int is_nested)
{
    int64_t places[4], codes[4], nested[4];
#pragma GCC unroll 4
    for (int i = 0; i < per_group; i++) {
        places[i] = block + (i < there ? i : there - 1);
        codes[i] = is_nested ? p->absmax8[places[i]] : 0;
        nested[i] = places[i] >> 8;
    }
    if (!is_nested)
        return spread_avx512(p->absmax, places, per_group);
    __m512 product =
        _mm512_mul_ps(spread_avx512(p->table8, codes, per_group), spread_avx512(p->nested, nested, per_group));
    return _mm512_add_ps(product, _mm512_set1_ps(p->offset));
}

#define TARGET TARGET_AVX512
#define FN(name) name##_avx512
#define NUMBER float
#define TABLE __m512
#define OPEN(tables) _mm512_loadu_ps((tables)->lut)
#define UNIT(tables) 1.0f
#define VALUES 16
#define SHIFTED(codes) _mm512_srli_epi32(codes, 4)
#define LOOK_UP(codes, table) _mm512_permutexvar_ps(codes, table)
#define ADD(sums, values, x) _mm512_fmadd_ps(values, _mm512_loadu_ps(x), sums)
#include "ops4bit_gemv_loops.h"

#define SHARED_AVX512                                                                                                  \
    widen_avx2, errors_avx512, nearest_avx512, decode_avx512, dot_avx512, dense_avx512, 16, multiply_avx512

static const Ops4bitLoops WITH_AVX512 = {SHARED_AVX512, 0, 0};

/* ---- AVX512-BF16 ---- */

#ifdef HAS_BF16

#define TARGET TARGET_BF16
#define FN(name) name##_bf16
#define NUMBER uint16_t
#define TABLE __m512i
#define OPEN(tables) _mm512_loadu_si512((tables)->rounded)
#define UNIT(tables) (tables)->unit
#define VALUES 32
#define SHIFTED(codes) _mm512_srli_epi16(codes, 4)
#define LOOK_UP(codes, table) _mm512_permutexvar_epi16(codes, table)
#define ADD(sums, values, x) _mm512_dpbf16_ps(sums, (__m512bh)(values), (__m512bh)_mm512_loadu_si512(x))
#include "ops4bit_gemv_loops.h"

/* The sums of 16 registers, in their order: halves are added crosswise, each time of half as many registers. */
TARGET_BF16 ALWAYS_INLINE __m512 sums_of_16(const __m512 *x)
{
    __m512 four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 first =
            _mm512_add_ps(_mm512_unpacklo_ps(x[4 * i], x[4 * i + 1]), _mm512_unpackhi_ps(x[4 * i], x[4 * i + 1]));
        __m512 last = _mm512_add_ps(_mm512_unpacklo_ps(x[4 * i + 2], x[4 * i + 3]),
                                    _mm512_unpackhi_ps(x[4 * i + 2], x[4 * i + 3]));
        __m512d pair[2] = {_mm512_castps_pd(first), _mm512_castps_pd(last)};
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pair[0], pair[1])),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(pair[0], pair[1])));
    }
    __m512 low =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[0], four[1], 0xEE));
    __m512 high =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x44), _mm512_shuffle_f32x4(four[2], four[3], 0xEE));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
}

/* sums[row][feature] += row of x times feature, for 4 of each side by side, over n columns: a multiple of 32. */
TARGET_BF16 static void tile_bf16(const uint16_t *const *x, const uint16_t *const *w, int64_t n, float (*sums)[TILE])
{
    __m512 lanes[TILE * TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE * TILE; i++)
        lanes[i] = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 32) {
        __m512bh rows[TILE];
#pragma GCC unroll 4
        for (int row = 0; row < TILE; row++)
            rows[row] = (__m512bh)_mm512_loadu_si512(x[row] + i);
#pragma GCC unroll 4
        for (int feature = 0; feature < TILE; feature++) {
            __m512bh weights = (__m512bh)_mm512_loadu_si512(w[feature] + i);
#pragma GCC unroll 4
            for (int row = 0; row < TILE; row++)
                lanes[TILE * row + feature] = _mm512_dpbf16_ps(lanes[TILE * row + feature], rows[row], weights);
        }
    }
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), sums_of_16(lanes)));
}

static const Ops4bitLoops WITH_BF16 = {SHARED_AVX512, multiply_bf16, tile_bf16};

#endif

#endif
