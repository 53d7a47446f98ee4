/* What happens between the products of a training step, for one core: norms, gates, dropout, the loss, rotary
positions.

`pointwise/torch.py` says what each result must be. Arithmetic is float32 with one rounding at the end; sums and
functions may differ from it in their last places, dropout has its bits. The loops are written once, in
pointwise_loops.h, over vectors of LANES32 numbers, and included here once for each set of instructions. */

#include "pointwise.h"

/* One set of loops, over rows, heads of all rows (decode_attention) or elements (gates, dropout) [first, last). */
typedef struct {
    void (*rms_norm)(const Norm *a, int64_t first, int64_t last);
    void (*rms_norm_backward)(const Norm *a, int64_t first, int64_t last);
    void (*gated)(const Gate *a, int64_t first, int64_t last);
    void (*gated_backward)(const Gate *a, int64_t first, int64_t last);
    void (*dropout)(const Dropout *a, int64_t first, int64_t last);
    void (*cross_entropy)(const Loss *a, int64_t first, int64_t last);
    void (*rope)(const Rotation *a, int64_t first, int64_t last);
    void (*decode_attention)(const DecodeAttention *a, int64_t first, int64_t last);
} PointwiseLoops;

static inline char *at(const void *start, int64_t element, int64_t dtype)
{
    return (char *)start + element * bytes_of(dtype);
}

/* The type is a constant in each copy of a loop. */
#define FOR_EACH_TYPE(loop, a, first, last)                                                                            \
    switch ((a)->dtype) {                                                                                              \
    case FLOAT32:                                                                                                      \
        loop(a, FLOAT32, first, last);                                                                                 \
        break;                                                                                                         \
    case FLOAT16:                                                                                                      \
        loop(a, FLOAT16, first, last);                                                                                 \
        break;                                                                                                         \
    default:                                                                                                           \
        loop(a, BFLOAT16, first, last);                                                                                \
        break;                                                                                                         \
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

#define TARGET
#define FN(name) name##_plain_rows
#define LANES32 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define MAX(a, b) choose4((a) > (b), a, b)
#define MIN(a, b) choose4((a) < (b), a, b)
#define OF_HALVES(halves) of_halves4(halves)
#define TO_HALVES(wide) to_halves4(wide)
#define OF_BFLOATS(halves) of_bfloats4(halves)
#define TO_BFLOATS(wide) to_bfloats4(wide)
#include "pointwise_loops.h"

#if defined(__x86_64__)

/* ---- AVX2 ---- */

TARGET_AVX2 static inline __m256 of_bfloats_avx2(__m128i halves)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

TARGET_AVX2 static inline __m128i to_bfloats_avx2(__m256 wide)
{
    __m256i words = rounded_avx2(wide, BFLOAT16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

#define TARGET TARGET_AVX2
#define FN(name) name##_avx2_rows
#define LANES32 8
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#define OF_HALVES(halves) _mm256_cvtph_ps((__m128i)(halves))
#define TO_HALVES(wide) _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define OF_BFLOATS(halves) of_bfloats_avx2((__m128i)(halves))
#define TO_BFLOATS(wide) to_bfloats_avx2(wide)
#include "pointwise_loops.h"

/* ---- AVX-512 ---- */

TARGET_AVX512 static inline __m512 of_bfloats_avx512(__m256i halves)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

TARGET_AVX512 static inline __m256i to_bfloats_avx512(__m512 wide)
{
    return _mm512_cvtepi32_epi16(bfloats_avx512(wide));
}

#define TARGET TARGET_AVX512
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
#include "pointwise_loops.h"

#endif

/* ---- which set runs ---- */

static const PointwiseLoops *active = &set_plain_rows;

void pointwise_use(int isa)
{
    active = &set_plain_rows;
#if defined(__x86_64__)
    active = isa >= ISA_AVX512 ? &set_avx512_rows : isa == ISA_AVX2 ? &set_avx2_rows : &set_plain_rows;
#else
    (void)isa;
#endif
}

#define EXPORT_LOOP(name, Arguments)                                                                                   \
    EXPORT void nybble_##name(const Arguments *arguments, int64_t first, int64_t last)                                 \
    {                                                                                                                  \
        active->name(arguments, first, last);                                                                          \
    }

EXPORT_LOOP(rms_norm, Norm)
EXPORT_LOOP(rms_norm_backward, Norm)
EXPORT_LOOP(gated, Gate)
EXPORT_LOOP(gated_backward, Gate)
EXPORT_LOOP(dropout, Dropout)
EXPORT_LOOP(cross_entropy, Loss)
EXPORT_LOOP(rope, Rotation)
EXPORT_LOOP(decode_attention, DecodeAttention)
