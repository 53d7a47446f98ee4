/* Encoding of GGUF's blocks in native code, with the bits of `quant/kquants.py`.

The loops are written once, in kquants_loops.h, with vectors of 16 numbers whatever the machine has, and included here
once for each set of instructions. */

#include "kquants.h"

#define REFITS 2
#define PASSES 2
#define TINY_SCALE 1e-30f

typedef float F16X __attribute__((vector_size(64)));
typedef F16X F16X_MEMORY __attribute__((aligned(4), may_alias));
typedef int32_t I16X __attribute__((vector_size(64)));

ALWAYS_INLINE float inverse_of(float value)
{
    return (value < 0 ? -value : value) < TINY_SCALE ? 0.0f : 1.0f / value;
}

ALWAYS_INLINE float quotient_of(float above, float below)
{
    return below < TINY_SCALE ? 0.0f : above / below;
}

ALWAYS_INLINE float limited(float value, float least, float largest)
{
    value = value < least ? least : value;
    return value > largest ? largest : value;
}

/* To the nearest whole number, ties to even; of numbers below 2^22. */
ALWAYS_INLINE float whole_of(float value)
{
    return (value + 12582912.0f) - 12582912.0f;
}

ALWAYS_INLINE float as_half(float value)
{
    return float_of_half(half_of_float(limited(value, -65504.0f, 65504.0f)));
}

#define TARGET
#define FN(name) name##_plain_kquants
#include "kquants_loops.h"

#if defined(__x86_64__)

#define TARGET TARGET_AVX2
#define FN(name) name##_avx2_kquants
#include "kquants_loops.h"

#define TARGET TARGET_AVX512
#define FN(name) name##_avx512_kquants
#include "kquants_loops.h"

#endif

static void (*active)(const KQuant *t, int64_t first, int64_t last) = fit_plain_kquants;

void kquants_use(int isa)
{
    active = fit_plain_kquants;
#if defined(__x86_64__)
    if (isa >= ISA_AVX512)
        active = fit_avx512_kquants;
    else if (isa == ISA_AVX2)
        active = fit_avx2_kquants;
#else
    (void)isa;
#endif
}

/* Fit the blocks [first, last). */
EXPORT void nybble_kquants(const KQuant *t, int64_t first, int64_t last)
{
    active(t, first, last);
}
