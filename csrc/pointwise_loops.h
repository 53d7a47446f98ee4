/* The loops of pointwise.c for one set of instructions; included once for each, with these defined (and undefined at
the end): TARGET, the functions' attribute; FN, their names; LANES32, how many float32 a vector has; FMA, MAX and
MIN (the second where one is no number); OF_HALVES and TO_HALVES, OF_BFLOATS and TO_BFLOATS, float16 and bfloat16
both ways; TIMES_POWER, x 2^n, where there is an instruction. */

#define F32X FN(floats)
#define I32X FN(ints)
#define U32X FN(words)
#define U16X FN(halves)
#define SPLAT(x) ((x) - (F32X){0})

/* The statements for each vector of [first, last), which starts at i and has `left` numbers: in the last one perhaps
less than LANES32, which is a constant in the others. */
#define FOR_VECTORS(i, first, last, ...)                                                                               \
    do {                                                                                                               \
        int64_t i = (first);                                                                                           \
        for (; i + LANES32 <= (last); i += LANES32) {                                                                  \
            const int64_t left = LANES32;                                                                              \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
        if (i < (last)) {                                                                                              \
            const int64_t left = (last) - i;                                                                           \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
    } while (0)

typedef float F32X __attribute__((vector_size(4 * LANES32)));
typedef int32_t I32X __attribute__((vector_size(4 * LANES32)));
typedef uint32_t U32X __attribute__((vector_size(4 * LANES32)));
typedef uint16_t U16X __attribute__((vector_size(2 * LANES32)));

TARGET ALWAYS_INLINE F32X FN(choose)(I32X first, F32X a, F32X b)
{
    return (F32X)(((I32X)a & first) | ((I32X)b & ~first));
}

TARGET ALWAYS_INLINE I32X FN(lanes)(void)
{
    I32X lanes;
    for (int k = 0; k < LANES32; k++)
        lanes[k] = k;
    return lanes;
}

/* ---- memory ---- */

/* Lanes that are not there are zeros. */
TARGET ALWAYS_INLINE F32X FN(load)(const char *from, int64_t dtype, int64_t left)
{
    char padded[4 * LANES32];
    F32X wide;
    U16X halves;
    if (left < LANES32) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, from, (size_t)(left * bytes_of(dtype)));
        from = padded;
    }
    if (dtype == FLOAT32) {
        memcpy(&wide, from, sizeof wide);
        return wide;
    }
    memcpy(&halves, from, sizeof halves);
    return dtype == FLOAT16 ? (F32X)OF_HALVES(halves) : (F32X)OF_BFLOATS(halves);
}

/* The lanes that are not there as `fill`. */
TARGET ALWAYS_INLINE F32X FN(filled)(F32X x, int64_t left, float fill)
{
    return left < LANES32 ? FN(choose)(FN(lanes)() < (int32_t)left, x, SPLAT(fill)) : x;
}

/* As it is after having been stored. */
TARGET ALWAYS_INLINE F32X FN(rounded)(F32X x, int64_t dtype)
{
    if (dtype == FLOAT32)
        return x;
    U16X halves = dtype == FLOAT16 ? (U16X)TO_HALVES(x) : (U16X)TO_BFLOATS(x);
    return dtype == FLOAT16 ? (F32X)OF_HALVES(halves) : (F32X)OF_BFLOATS(halves);
}

TARGET ALWAYS_INLINE void FN(store)(char *to, F32X x, int64_t dtype, int64_t left)
{
    U16X halves;
    if (dtype == FLOAT32) {
        memcpy(to, &x, left == LANES32 ? sizeof x : (size_t)left * 4);
        return;
    }
    halves = dtype == FLOAT16 ? (U16X)TO_HALVES(x) : (U16X)TO_BFLOATS(x);
    memcpy(to, &halves, left == LANES32 ? sizeof halves : (size_t)left * 2);
}

/* ---- functions ---- */

TARGET ALWAYS_INLINE float FN(sum)(F32X x)
{
    float lanes[LANES32];
    memcpy(lanes, &x, sizeof x);
    for (int half = LANES32 / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            lanes[k] += lanes[k + half];
    return lanes[0];
}

TARGET ALWAYS_INLINE float FN(largest)(F32X x)
{
    float lanes[LANES32];
    memcpy(lanes, &x, sizeof x);
    for (int k = 1; k < LANES32; k++)
        lanes[0] = lanes[k] > lanes[0] ? lanes[k] : lanes[0];
    return lanes[0];
}

#include "exponential_loops.h"

/* Near zero x + x^3 p(x^2), p by Moshier's Cephes (tanhf); elsewhere from e^2|x|. */
TARGET ALWAYS_INLINE F32X FN(tanh)(F32X x)
{
    I32X sign = (I32X)x & INT32_MIN;
    F32X magnitude = (F32X)((I32X)x ^ sign), square = x * x;
    F32X p = FMA(SPLAT(-5.70498872745e-3f), square, SPLAT(2.06390887954e-2f));
    p = FMA(p, square, SPLAT(-5.37397155531e-2f));
    p = FMA(p, square, SPLAT(1.33314422036e-1f));
    p = FMA(p, square, SPLAT(-3.33332819422e-1f));
    F32X small = FMA(p, square * x, x), large = 1.0f - 2.0f / (FN(exp)(2.0f * magnitude) + 1.0f);
    return FN(choose)(magnitude < 0.625f, small, (F32X)((I32X)large | sign));
}

/* ---- norms ---- */

TARGET ALWAYS_INLINE F32X FN(weight)(const Norm *a, const void *weights, int64_t i, int64_t left)
{
    F32X weight = FN(load)(at(weights, i, a->weight_dtype), a->weight_dtype, left);
    return a->unit_offset ? 1.0f + weight : weight;
}

TARGET ALWAYS_INLINE void FN(rms_norm_of)(const Norm *a, int64_t dtype, int64_t first, int64_t last)
{
    const void *weights = a->weight;
    int64_t width = a->width;
    for (int64_t row = first; row < last; row++) {
        const char *x = at(a->x, row * width, dtype);
        char *out = at(a->out, row * width, dtype);
        F32X squares = {0};
        FOR_VECTORS(i, 0, width, {
            F32X wide = FN(load)(at(x, i, dtype), dtype, left);
            squares = FMA(wide, wide, squares);
        });
        float rstd = 1.0f / __builtin_sqrtf(FN(sum)(squares) / (float)width + a->eps);
        a->rstd[row] = rstd;
        FOR_VECTORS(i, 0, width, {
            F32X normed = FN(load)(at(x, i, dtype), dtype, left) * rstd;
            normed = a->unit_offset ? normed : FN(rounded)(normed, dtype);
            FN(store)(at(out, i, dtype), normed * FN(weight)(a, weights, i, left), dtype, left);
        });
    }
}

TARGET ALWAYS_INLINE void FN(rms_norm_backward_of)(const Norm *a, int64_t dtype, int64_t first, int64_t last)
{
    const void *weights = a->weight;
    int64_t width = a->width;
    for (int64_t row = first; row < last; row++) {
        const char *x = at(a->x, row * width, dtype), *grad = at(a->grad, row * width, dtype);
        char *out = at(a->out, row * width, dtype);
        float rstd = a->rstd[row];
        F32X sums = {0};
        FOR_VECTORS(i, 0, width, {
            F32X scaled = FN(load)(at(grad, i, dtype), dtype, left) * FN(weight)(a, weights, i, left);
            sums = FMA(scaled, FN(load)(at(x, i, dtype), dtype, left) * rstd, sums);
        });
        F32X mean = SPLAT(FN(sum)(sums) / (float)width);
        FOR_VECTORS(i, 0, width, {
            F32X scaled = FN(load)(at(grad, i, dtype), dtype, left) * FN(weight)(a, weights, i, left);
            F32X normed = FN(load)(at(x, i, dtype), dtype, left) * rstd;
            FN(store)(at(out, i, dtype), FMA(normed, -mean, scaled) * rstd, dtype, left);
        });
    }
}

/* ---- gates ---- */

/* activation(x) = x s. GELU's tanh form is such too: (1 + tanh z) / 2 = sigmoid(2 z); z(x) = ROOT x (1 + CUBE x^2). */
#define GELU_ROOT 0.7978845608f
#define GELU_CUBE 0.044715f

TARGET ALWAYS_INLINE F32X FN(gate_factor)(F32X x, int64_t is_gelu)
{
    return FN(sigmoid)(is_gelu ? 2 * GELU_ROOT * x * FMA(x * x, SPLAT(GELU_CUBE), SPLAT(1.0f)) : x);
}

TARGET ALWAYS_INLINE void FN(gated_of)(const Gate *a, int64_t dtype, int64_t first, int64_t last)
{
    const void *gates = a->gate, *ups = a->up;
    void *out = a->out;
    int64_t is_gelu = a->is_gelu;
    FOR_VECTORS(i, first, last, {
        F32X gate = FN(load)(at(gates, i, dtype), dtype, left);
        F32X up = FN(load)(at(ups, i, dtype), dtype, left);
        FN(store)(at(out, i, dtype), gate * FN(gate_factor)(gate, is_gelu) * up, dtype, left);
    });
}

/* d activation / dx = s + x s (1 - s) z', z' = 1 for SiLU and 2 ROOT (1 + 3 CUBE x^2) for GELU. */
TARGET ALWAYS_INLINE void FN(gated_backward_of)(const Gate *a, int64_t dtype, int64_t first, int64_t last)
{
    void *gates = a->gate, *ups = a->up, *grads = a->grad;
    int64_t is_gelu = a->is_gelu;
    FOR_VECTORS(i, first, last, {
        F32X gate = FN(load)(at(gates, i, dtype), dtype, left);
        F32X up = FN(load)(at(ups, i, dtype), dtype, left);
        F32X grad = FN(load)(at(grads, i, dtype), dtype, left);
        F32X share = FN(gate_factor)(gate, is_gelu);
        F32X active = gate * share;
        F32X slope = active * (1.0f - share);
        if (is_gelu)
            slope *= 2 * GELU_ROOT * FMA(gate * gate, SPLAT(3 * GELU_CUBE), SPLAT(1.0f));
        FN(store)(at(grads, i, dtype), active * up, dtype, left);
        FN(store)(at(gates, i, dtype), grad * up * (slope + share), dtype, left);
        FN(store)(at(ups, i, dtype), grad * active, dtype, left);
    });
}

/* ---- dropout ---- */

/* MurmurHash3's finalizer over place and seed; products and sums are not fused, so that the bits are those of torch. */
TARGET ALWAYS_INLINE void FN(dropout_of)(const Dropout *a, int64_t dtype, int64_t first, int64_t last)
{
    const Dropout own = *a;
    const U32X lanes = (U32X)FN(lanes)();
    FOR_VECTORS(i, first, last, {
        U32X hash = (lanes + (uint32_t)i) * 0x9E3779B1u + own.seed;
        hash = (hash ^ hash >> 16) * 0x85EBCA6Bu;
        hash = (hash ^ hash >> 13) * 0xC2B2AE35u;
        I32X kept = (I32X)((hash ^ hash >> 16) >= own.threshold);
        F32X x = FN(load)(at(own.x, i, dtype), dtype, left) * own.scale;
        x = (F32X)((I32X)x & kept);
        if (own.adds)
            x = FN(load)(at(own.out, i, dtype), dtype, left) + x;
        FN(store)(at(own.out, i, dtype), x, dtype, left);
    });
}

/* ---- loss ---- */

/* A logit as it counts: c tanh(x / c) where there is a cap. */
TARGET ALWAYS_INLINE F32X FN(capped)(F32X x, float softcap)
{
    return softcap > 0 ? softcap * FN(tanh)(x * (1.0f / softcap)) : x;
}

/* dL/dx from dL/d logit: c tanh(x / c) has the slope 1 - (logit / c)^2. */
TARGET ALWAYS_INLINE F32X FN(uncapped)(F32X grad, F32X logit, float softcap)
{
    F32X share = logit * (1.0f / softcap);
    return softcap > 0 ? grad * (1.0f - share * share) : grad;
}

/* In three passes over a row, which stays in the second-level cache as what is kept of it does: the exponentials and,
where there is a cap, the logits after it. Lanes that are not there count as -infinity. */
TARGET ALWAYS_INLINE void FN(cross_entropy_of)(const Loss *a, int64_t dtype, int64_t first, int64_t last)
{
    const float softcap = a->softcap, least = -__builtin_inff();
    const int64_t width = a->width, kind = softcap > 0 ? FLOAT32 : dtype;
    float *powers = a->scratch, *kept = a->scratch + width;
    for (int64_t n = first; n < last; n++) {
        char *row = at(a->logits, n * width, dtype), *picked = at(row, a->labels[n], dtype);
        const void *logits = softcap > 0 ? (const void *)kept : row;
        F32X tops = SPLAT(least), totals = {0};
        FOR_VECTORS(i, 0, width, {
            F32X logit = FN(capped)(FN(load)(at(row, i, dtype), dtype, left), softcap);
            if (softcap > 0)
                FN(store)((char *)(kept + i), logit, FLOAT32, left);
            tops = MAX(tops, FN(filled)(logit, left, least));
        });
        F32X top = SPLAT(FN(largest)(tops));
        FOR_VECTORS(i, 0, width, {
            F32X logit = FN(filled)(FN(load)(at(logits, i, kind), kind, left), left, least);
            F32X power = FN(exp)(logit - top);
            FN(store)((char *)(powers + i), power, FLOAT32, left);
            totals += power;
        });
        F32X label = FN(load)(at(logits, a->labels[n], kind), kind, 1);
        F32X share = SPLAT(1.0f / FN(sum)(totals));
        a->below[n] = top[0] - label[0];
        a->total[n] = FN(sum)(totals);
        FOR_VECTORS(i, 0, width, {
            F32X grad = FN(load)((const char *)(powers + i), FLOAT32, left) * share;
            F32X logit = FN(load)(at(logits, i, kind), kind, left);
            FN(store)(at(row, i, dtype), FN(uncapped)(grad, logit, softcap), dtype, left);
        });
        F32X grad = powers[a->labels[n]] * share - 1.0f;
        FN(store)(picked, FN(uncapped)(grad, label, softcap), dtype, 1);
    }
}

/* ---- rotary positions ---- */

TARGET ALWAYS_INLINE void FN(rope_of)(const Rotation *a, int64_t dtype, int64_t first, int64_t last)
{
    const Rotation own = *a;
    const int64_t half = own.rotated / 2, kind = own.table_dtype;
    for (int64_t row = first; row < last; row++) {
        const char *x = at(own.x, row * own.row_stride, dtype);
        const char *cos = at(own.cos, row * own.rotated, kind), *sin = at(own.sin, row * own.rotated, kind);
        char *out = at(own.out, row * own.heads * own.width, dtype);
        FOR_VECTORS(i, 0, half, {
            F32X cos1 = FN(load)(at(cos, i, kind), kind, left);
            F32X cos2 = FN(load)(at(cos, half + i, kind), kind, left);
            F32X sin1 = FN(load)(at(sin, i, kind), kind, left) * own.sign;
            F32X sin2 = FN(load)(at(sin, half + i, kind), kind, left) * own.sign;
            for (int64_t head = 0; head < own.heads; head++) {
                const char *from = at(x, head * own.head_stride + i, dtype);
                char *to = at(out, head * own.width + i, dtype);
                F32X x1 = FN(load)(from, dtype, left);
                F32X x2 = FN(load)(at(from, half, dtype), dtype, left);
                FN(store)(to, x1 * cos1 - x2 * sin1, dtype, left);
                FN(store)(at(to, half, dtype), x2 * cos2 + x1 * sin2, dtype, left);
            }
        });
        for (int64_t head = 0; head < own.heads && own.rotated < own.width; head++)
            memcpy(at(out, head * own.width + own.rotated, dtype), at(x, head * own.head_stride + own.rotated, dtype),
                   (size_t)((own.width - own.rotated) * bytes_of(dtype)));
    }
}

/* ---- attention of one token ---- */

TARGET ALWAYS_INLINE void FN(decode_attention_of)(const DecodeAttention *a, int64_t dtype, int64_t first, int64_t last)
{
    const DecodeAttention own = *a;
    const int64_t tokens = own.tokens, width = own.width, shared = own.heads / own.kv_heads;
    const float least = -__builtin_inff();
    for (int64_t task = first; task < last; task++) {
        const int64_t row = task / own.heads, head = task % own.heads / shared;
        const char *q = at(own.q, task * width, dtype);
        const char *k = at(own.k, row * own.k_strides[0] + head * own.k_strides[1], dtype);
        const char *v = at(own.v, row * own.v_strides[0] + head * own.v_strides[1], dtype);
        char *out = at(own.out, task * width, dtype), *scores = (char *)(own.scores + task * tokens);
        F32X tops = SPLAT(least), totals = {0};
        for (int64_t t = 0; t < tokens; t++) {
            F32X products = {0};
            FOR_VECTORS(i, 0, width, {
                F32X key = FN(load)(at(k, t * own.k_strides[2] + i, dtype), dtype, left);
                products = FMA(FN(load)(at(q, i, dtype), dtype, left), key, products);
            });
            own.scores[task * tokens + t] = FN(sum)(products) * own.scale;
        }
        FOR_VECTORS(t, 0, tokens, {
            F32X score = FN(load)(at(scores, t, FLOAT32), FLOAT32, left);
            tops = MAX(tops, FN(filled)(score, left, least));
        });
        F32X top = SPLAT(FN(largest)(tops));
        FOR_VECTORS(t, 0, tokens, {
            F32X score = FN(load)(at(scores, t, FLOAT32), FLOAT32, left);
            F32X power = FN(exp)(FN(filled)(score, left, least) - top);
            FN(store)(at(scores, t, FLOAT32), power, FLOAT32, left);
            totals += power;
        });
        float share = 1.0f / FN(sum)(totals);
        FOR_VECTORS(i, 0, width, {
            F32X sums = {0};
            for (int64_t t = 0; t < tokens; t++) {
                F32X value = FN(load)(at(v, t * own.v_strides[2] + i, dtype), dtype, left);
                sums = FMA(value, SPLAT(own.scores[task * tokens + t]), sums);
            }
            FN(store)(at(out, i, dtype), sums * share, dtype, left);
        });
    }
}

/* ---- the set ---- */

#define LOOP(name, Arguments)                                                                                          \
    TARGET static void FN(name)(const Arguments *a, int64_t first, int64_t last)                                       \
    {                                                                                                                  \
        FOR_EACH_TYPE(FN(name##_of), a, first, last)                                                                   \
    }

LOOP(rms_norm, Norm)
LOOP(rms_norm_backward, Norm)
LOOP(gated, Gate)
LOOP(gated_backward, Gate)
LOOP(dropout, Dropout)
LOOP(cross_entropy, Loss)
LOOP(rope, Rotation)
LOOP(decode_attention, DecodeAttention)

static const PointwiseLoops FN(set) = {FN(rms_norm), FN(rms_norm_backward), FN(gated), FN(gated_backward),
                                       FN(dropout),  FN(cross_entropy),     FN(rope),  FN(decode_attention)};

#undef TARGET
#undef FN
#undef LANES32
#undef FMA
#undef MAX
#undef MIN
#undef TIMES_POWER
#undef OF_HALVES
#undef TO_HALVES
#undef OF_BFLOATS
#undef TO_BFLOATS
#undef F32X
#undef I32X
#undef U32X
#undef U16X
#undef SPLAT
#undef FOR_VECTORS
#undef GELU_ROOT
#undef GELU_CUBE
#undef LOOP
