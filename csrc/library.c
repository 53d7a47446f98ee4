/* What a caller asks the library as a whole: whether it fits, and which set of instructions it uses.

Loaded with ctypes: no Python header is needed, and there is no PyInit. */

#include "attention.h"
#include "kquants.h"
#include "linear_attention.h"
#include "ops4bit.h"
#include "pointwise.h"

/* ---- whether caller and library fit each other ---- */

EXPORT int nybble_abi(void)
{
    return NYBBLE_ABI;
}

/* A constant that callers rely on, or the size of a structure that they mirror; -1 for an unknown name. */
EXPORT int64_t nybble_constant(const char *name)
{
#define CONSTANT(name) {#name, name}
#define SIZE(Type)                                                                                                     \
    {                                                                                                                  \
        "sizeof " #Type, sizeof(Type)                                                                                  \
    }
    static const struct {
        const char *name;
        int64_t value;
    } known[] = {
        CONSTANT(MAX_BLOCK),
        CONSTANT(MAX_CANDIDATES),
        CONSTANT(MAX_ROWS),
        CONSTANT(MANY_ROWS),
        CONSTANT(MAX_WIDTH),
        CONSTANT(FLOAT32),
        CONSTANT(FLOAT16),
        CONSTANT(BFLOAT16),
        SIZE(Tables),
        SIZE(Source),
        SIZE(Packed),
        SIZE(Nested),
        SIZE(Product),
        SIZE(Columns),
        SIZE(Norm),
        SIZE(Gate),
        SIZE(Dropout),
        SIZE(Loss),
        SIZE(Rotation),
        SIZE(DecodeAttention),
        SIZE(StridedHeads),
        SIZE(Segment),
        SIZE(Attention),
        SIZE(StridedTokens),
        SIZE(Chunk),
        SIZE(LinearAttention),
        SIZE(Convolution),
        SIZE(KQuant),
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(name, known[i].name) == 0)
            return known[i].value;
    return -1;
}

/* ---- which set of instructions runs ---- */

static int chosen = ISA_PLAIN;

/* The best set that this machine can run. */
EXPORT int nybble_best_isa(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return ISA_PLAIN;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl"))
        return ISA_AVX2; /* every processor with AVX2 has F16C */
#if defined(HAS_BF16)
    if (__builtin_cpu_supports("avx512bf16"))
        return ISA_BF16;
#endif
    return ISA_AVX512;
#else
    return ISA_PLAIN;
#endif
}

/* Choose a set; returns it, or -1 where this machine cannot run it. Not while loops are running. */
EXPORT int nybble_set_isa(int isa)
{
    if (isa < ISA_PLAIN || isa > nybble_best_isa())
        return -1;
    chosen = isa;
    ops4bit_use(isa);
    pointwise_use(isa);
    linear_attention_use(isa);
    kquants_use(isa);
    return isa;
}

/* The set that is chosen. */
EXPORT int nybble_isa(void)
{
    return chosen;
}
