/* The loops of native_rows.h for one set of instructions; included once for each, with these defined (and undefined at
the end): SET, the functions' attribute; FN, their names; LANES32, how many float32 a vector has; FMA, MAX and MIN (the
second where one is no number); OF_HALVES and TO_HALVES, OF_BFLOATS and TO_BFLOATS, float16 and bfloat16 both ways;
TIMES_POWER, x 2^n, where there is an instruction. */

#define INLINE SET static inline __attribute__((always_inline))
#define V FN(floats)
#define I FN(ints)
#define U FN(words)
#define H FN(halves)
#define ALL(x) ((x) - (V){0})

/* The statements for each vector of [first, last), which starts at i and has `left` numbers: in the last one perhaps less
than LANES32, which is a constant in the others. */
#define FOR_VECTORS(i, first, last, ...)                    \
    do {                                                    \
        int64_t i = (first);                                \
        for (; i + LANES32 <= (last); i += LANES32) {       \
            const int64_t left = LANES32;                   \
            __VA_ARGS__                                     \
        }                                                   \
        if (i < (last)) {                                   \
            const int64_t left = (last) - i;                \
            __VA_ARGS__                                     \
        }                                                   \
    } while (0)

typedef float V __attribute__((vector_size(4 * LANES32)));
typedef int32_t I __attribute__((vector_size(4 * LANES32)));
typedef uint32_t U __attribute__((vector_size(4 * LANES32)));
typedef uint16_t H __attribute__((vector_size(2 * LANES32)));

INLINE V FN(choose)(I first, V a, V b)
{
    return (V)(((I)a & first) | ((I)b & ~first));
}

INLINE I FN(lanes)(void)
{
    I lanes;
    for (int k = 0; k < LANES32; k++)
        lanes[k] = k;
    return lanes;
}

/* ---- memory ---- */

/* Lanes that are not there are zeros. */
INLINE V FN(load)(const char *from, int64_t dtype, int64_t left)
{
    char padded[4 * LANES32];
    V wide;
    H halves;
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
    return dtype == FLOAT16 ? (V)OF_HALVES(halves) : (V)OF_BFLOATS(halves);
}

/* The lanes that are not there as `fill`. */
INLINE V FN(filled)(V x, int64_t left, float fill)
{
    return left < LANES32 ? FN(choose)(FN(lanes)() < (int32_t)left, x, ALL(fill)) : x;
}

/* As it is after having been stored. */
INLINE V FN(rounded)(V x, int64_t dtype)
{
    if (dtype == FLOAT32)
        return x;
    H halves = dtype == FLOAT16 ? (H)TO_HALVES(x) : (H)TO_BFLOATS(x);
    return dtype == FLOAT16 ? (V)OF_HALVES(halves) : (V)OF_BFLOATS(halves);
}

INLINE void FN(store)(char *to, V x, int64_t dtype, int64_t left)
{
    H halves;
    if (dtype == FLOAT32) {
        memcpy(to, &x, left == LANES32 ? sizeof x : (size_t)left * 4);
        return;
    }
    halves = dtype == FLOAT16 ? (H)TO_HALVES(x) : (H)TO_BFLOATS(x);
    memcpy(to, &halves, left == LANES32 ? sizeof halves : (size_t)left * 2);
}

/* ---- functions ---- */

INLINE float FN(sum)(V x)
{
    float lanes[LANES32];
    memcpy(lanes, &x, sizeof x);
    for (int half = LANES32 / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            lanes[k] += lanes[k + half];
    return lanes[0];
}

INLINE float FN(largest)(V x)
{
    float lanes[LANES32];
    memcpy(lanes, &x, sizeof x);
    for (int k = 1; k < LANES32; k++)
        lanes[0] = lanes[k] > lanes[0] ? lanes[k] : lanes[0];
    return lanes[0];
}

/* e^x = 2^n e^r with |r| <= ln 2 / 2, and a polynomial of least relative error for e^r (Remez: 2e-8 as rounded here). To
0 below -104 and to infinity above 89. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. */
INLINE V FN(exp)(V x)
{
    const float to_integer = 12582912.0f;
    x = MIN(ALL(89.0f), MAX(ALL(-104.0f), x));
    V shifted = FMA(x, ALL(1.44269504f), ALL(to_integer));
    V n = shifted - to_integer;
    V r = FMA(n, ALL(2.12194440e-4f), FMA(n, ALL(-0.693359375f), x)); /* ln 2 in two parts: n times the first is exact */
    V p = FMA(ALL(1.3836835e-3f), r, ALL(8.374824e-3f));
    p = FMA(p, r, ALL(4.1668225e-2f));
    p = FMA(p, r, ALL(1.666642e-1f));
    p = FMA(p, r, ALL(4.999999e-1f));
    p = FMA(p, r, ALL(1.0f));
    p = FMA(p, r, ALL(1.0f));
#if defined(TIMES_POWER)
    return TIMES_POWER(p, n);
#else
    I power = (I)shifted - (I)ALL(to_integer), half = power >> 1; /* 2^n itself may lie outside the normal numbers */
    return p * (V)((half + 127) << 23) * (V)((power - half + 127) << 23);
#endif
}

INLINE V FN(sigmoid)(V x)
{
    return 1.0f / (1.0f + FN(exp)(-x));
}

/* Near zero x + x^3 p(x^2), p by Moshier's Cephes (tanhf); elsewhere from e^2|x|. */
INLINE V FN(tanh)(V x)
{
    I sign = (I)x & INT32_MIN;
    V magnitude = (V)((I)x ^ sign), square = x * x;
    V p = FMA(ALL(-5.70498872745e-3f), square, ALL(2.06390887954e-2f));
    p = FMA(p, square, ALL(-5.37397155531e-2f));
    p = FMA(p, square, ALL(1.33314422036e-1f));
    p = FMA(p, square, ALL(-3.33332819422e-1f));
    V small = FMA(p, square * x, x), large = 1.0f - 2.0f / (FN(exp)(2.0f * magnitude) + 1.0f);
    return FN(choose)(magnitude < 0.625f, small, (V)((I)large | sign));
}

/* ---- norms ---- */

INLINE V FN(weight)(const Norm *a, const void *weights, int64_t i, int64_t left)
{
    V weight = FN(load)(at(weights, i, a->weight_dtype), a->weight_dtype, left);
    return a->one_plus ? 1.0f + weight : weight;
}

INLINE void FN(rms_norm_of)(const Norm *a, int64_t dtype, int64_t first, int64_t last)
{
    const void *weights = a->weight;
    int64_t width = a->width;
    for (int64_t row = first; row < last; row++) {
        const char *x = at(a->x, row * width, dtype);
        char *out = at(a->out, row * width, dtype);
        V squares = {0};
        FOR_VECTORS(i, 0, width, {
            V wide = FN(load)(at(x, i, dtype), dtype, left);
            squares = FMA(wide, wide, squares);
        });
        float rstd = 1.0f / __builtin_sqrtf(FN(sum)(squares) / (float)width + a->eps);
        a->rstd[row] = rstd;
        FOR_VECTORS(i, 0, width, {
            V normed = FN(load)(at(x, i, dtype), dtype, left) * rstd;
            normed = a->one_plus ? normed : FN(rounded)(normed, dtype);
            FN(store)(at(out, i, dtype), normed * FN(weight)(a, weights, i, left), dtype, left);
        });
    }
}

INLINE void FN(rms_norm_backward_of)(const Norm *a, int64_t dtype, int64_t first, int64_t last)
{
    const void *weights = a->weight;
    int64_t width = a->width;
    for (int64_t row = first; row < last; row++) {
        const char *x = at(a->x, row * width, dtype), *grad = at(a->grad, row * width, dtype);
        char *out = at(a->out, row * width, dtype);
        float rstd = a->rstd[row];
        V sums = {0};
        FOR_VECTORS(i, 0, width, {
            V scaled = FN(load)(at(grad, i, dtype), dtype, left) * FN(weight)(a, weights, i, left);
            sums = FMA(scaled, FN(load)(at(x, i, dtype), dtype, left) * rstd, sums);
        });
        V mean = ALL(FN(sum)(sums) / (float)width);
        FOR_VECTORS(i, 0, width, {
            V scaled = FN(load)(at(grad, i, dtype), dtype, left) * FN(weight)(a, weights, i, left);
            V normed = FN(load)(at(x, i, dtype), dtype, left) * rstd;
            FN(store)(at(out, i, dtype), FMA(normed, -mean, scaled) * rstd, dtype, left);
        });
    }
}

/* ---- gates ---- */

/* activation(x) = x s. GELU's tanh form is such too: (1 + tanh z) / 2 = sigmoid(2 z); z(x) = ROOT x (1 + CUBE x^2). */
#define GELU_ROOT 0.7978845608f
#define GELU_CUBE 0.044715f

INLINE V FN(share)(V x, int64_t is_gelu)
{
    return FN(sigmoid)(is_gelu ? 2 * GELU_ROOT * x * FMA(x * x, ALL(GELU_CUBE), ALL(1.0f)) : x);
}

INLINE void FN(gated_of)(const Gate *a, int64_t dtype, int64_t first, int64_t last)
{
    const void *gates = a->gate, *ups = a->up;
    void *out = a->out;
    int64_t is_gelu = a->is_gelu;
    FOR_VECTORS(i, first, last, {
        V gate = FN(load)(at(gates, i, dtype), dtype, left);
        V up = FN(load)(at(ups, i, dtype), dtype, left);
        FN(store)(at(out, i, dtype), gate * FN(share)(gate, is_gelu) * up, dtype, left);
    });
}

/* d activation / dx = s + x s (1 - s) z', z' = 1 for SiLU and 2 ROOT (1 + 3 CUBE x^2) for GELU. */
INLINE void FN(gated_backward_of)(const Gate *a, int64_t dtype, int64_t first, int64_t last)
{
    void *gates = a->gate, *ups = a->up, *grads = a->grad;
    int64_t is_gelu = a->is_gelu;
    FOR_VECTORS(i, first, last, {
        V gate = FN(load)(at(gates, i, dtype), dtype, left);
        V up = FN(load)(at(ups, i, dtype), dtype, left);
        V grad = FN(load)(at(grads, i, dtype), dtype, left);
        V share = FN(share)(gate, is_gelu);
        V active = gate * share;
        V slope = active * (1.0f - share);
        if (is_gelu)
            slope *= 2 * GELU_ROOT * FMA(gate * gate, ALL(3 * GELU_CUBE), ALL(1.0f));
        FN(store)(at(grads, i, dtype), active * up, dtype, left);
        FN(store)(at(gates, i, dtype), grad * up * (slope + share), dtype, left);
        FN(store)(at(ups, i, dtype), grad * active, dtype, left);
    });
}

/* ---- dropout ---- */

/* MurmurHash3's finalizer over place and seed; products and sums are not fused, so that the bits are those of torch. */
INLINE void FN(dropout_of)(const Dropout *a, int64_t dtype, int64_t first, int64_t last)
{
    const Dropout own = *a;
    const U lanes = (U)FN(lanes)();
    FOR_VECTORS(i, first, last, {
        U hash = (lanes + (uint32_t)i) * 0x9E3779B1u + own.seed;
        hash = (hash ^ hash >> 16) * 0x85EBCA6Bu;
        hash = (hash ^ hash >> 13) * 0xC2B2AE35u;
        I kept = (I)((hash ^ hash >> 16) >= own.threshold);
        V x = FN(load)(at(own.x, i, dtype), dtype, left) * own.scale;
        x = (V)((I)x & kept);
        if (own.adds)
            x = FN(load)(at(own.out, i, dtype), dtype, left) + x;
        FN(store)(at(own.out, i, dtype), x, dtype, left);
    });
}

/* ---- loss ---- */

/* A logit as it counts: c tanh(x / c) where there is a cap. */
INLINE V FN(capped)(V x, float softcap)
{
    return softcap > 0 ? softcap * FN(tanh)(x * (1.0f / softcap)) : x;
}

/* dL/dx from dL/d logit: c tanh(x / c) has the slope 1 - (logit / c)^2. */
INLINE V FN(uncapped)(V grad, V logit, float softcap)
{
    V share = logit * (1.0f / softcap);
    return softcap > 0 ? grad * (1.0f - share * share) : grad;
}

/* In three passes over a row, which stays in the second-level cache as what is kept of it does: the exponentials and,
where there is a cap, the logits after it. Lanes that are not there count as -infinity. */
INLINE void FN(cross_entropy_of)(const Loss *a, int64_t dtype, int64_t first, int64_t last)
{
    const float softcap = a->softcap, least = -__builtin_inff();
    const int64_t width = a->width, kind = softcap > 0 ? FLOAT32 : dtype;
    float *powers = a->scratch, *kept = a->scratch + width;
    for (int64_t n = first; n < last; n++) {
        char *row = at(a->logits, n * width, dtype), *picked = at(row, a->labels[n], dtype);
        const void *logits = softcap > 0 ? (const void *)kept : row;
        V tops = ALL(least), totals = {0};
        FOR_VECTORS(i, 0, width, {
            V logit = FN(capped)(FN(load)(at(row, i, dtype), dtype, left), softcap);
            if (softcap > 0)
                FN(store)((char *)(kept + i), logit, FLOAT32, left);
            tops = MAX(tops, FN(filled)(logit, left, least));
        });
        V top = ALL(FN(largest)(tops));
        FOR_VECTORS(i, 0, width, {
            V logit = FN(filled)(FN(load)(at(logits, i, kind), kind, left), left, least);
            V power = FN(exp)(logit - top);
            FN(store)((char *)(powers + i), power, FLOAT32, left);
            totals += power;
        });
        V label = FN(load)(at(logits, a->labels[n], kind), kind, 1);
        V share = ALL(1.0f / FN(sum)(totals));
        a->below[n] = top[0] - label[0];
        a->total[n] = FN(sum)(totals);
        FOR_VECTORS(i, 0, width, {
            V grad = FN(load)((const char *)(powers + i), FLOAT32, left) * share;
            V logit = FN(load)(at(logits, i, kind), kind, left);
            FN(store)(at(row, i, dtype), FN(uncapped)(grad, logit, softcap), dtype, left);
        });
        V grad = powers[a->labels[n]] * share - 1.0f;
        FN(store)(picked, FN(uncapped)(grad, label, softcap), dtype, 1);
    }
}

/* ---- rotary positions ---- */

INLINE void FN(rope_of)(const Rotation *a, int64_t dtype, int64_t first, int64_t last)
{
    const Rotation own = *a;
    const int64_t half = own.rotated / 2, kind = own.table_dtype;
    for (int64_t row = first; row < last; row++) {
        const char *x = at(own.x, row * own.row_stride, dtype);
        const char *cos = at(own.cos, row * own.rotated, kind), *sin = at(own.sin, row * own.rotated, kind);
        char *out = at(own.out, row * own.heads * own.width, dtype);
        FOR_VECTORS(i, 0, half, {
            V cos1 = FN(load)(at(cos, i, kind), kind, left);
            V cos2 = FN(load)(at(cos, half + i, kind), kind, left);
            V sin1 = FN(load)(at(sin, i, kind), kind, left) * own.sign;
            V sin2 = FN(load)(at(sin, half + i, kind), kind, left) * own.sign;
            for (int64_t head = 0; head < own.heads; head++) {
                const char *from = at(x, head * own.head_stride + i, dtype);
                char *to = at(out, head * own.width + i, dtype);
                V x1 = FN(load)(from, dtype, left);
                V x2 = FN(load)(at(from, half, dtype), dtype, left);
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

INLINE void FN(glance_of)(const Glance *a, int64_t dtype, int64_t first, int64_t last)
{
    const Glance own = *a;
    const int64_t tokens = own.tokens, width = own.width, shared = own.heads / own.kv_heads;
    const float least = -__builtin_inff();
    for (int64_t task = first; task < last; task++) {
        const int64_t row = task / own.heads, head = task % own.heads / shared;
        const char *q = at(own.q, task * width, dtype);
        const char *k = at(own.k, row * own.k_strides[0] + head * own.k_strides[1], dtype);
        const char *v = at(own.v, row * own.v_strides[0] + head * own.v_strides[1], dtype);
        char *out = at(own.out, task * width, dtype), *scores = (char *)(own.scores + task * tokens);
        V tops = ALL(least), totals = {0};
        for (int64_t t = 0; t < tokens; t++) {
            V products = {0};
            FOR_VECTORS(i, 0, width, {
                V key = FN(load)(at(k, t * own.k_strides[2] + i, dtype), dtype, left);
                products = FMA(FN(load)(at(q, i, dtype), dtype, left), key, products);
            });
            own.scores[task * tokens + t] = FN(sum)(products) * own.scale;
        }
        FOR_VECTORS(t, 0, tokens, {
            V score = FN(load)(at(scores, t, FLOAT32), FLOAT32, left);
            tops = MAX(tops, FN(filled)(score, left, least));
        });
        V top = ALL(FN(largest)(tops));
        FOR_VECTORS(t, 0, tokens, {
            V score = FN(load)(at(scores, t, FLOAT32), FLOAT32, left);
            V power = FN(exp)(FN(filled)(score, left, least) - top);
            FN(store)(at(scores, t, FLOAT32), power, FLOAT32, left);
            totals += power;
        });
        float share = 1.0f / FN(sum)(totals);
        FOR_VECTORS(i, 0, width, {
            V sums = {0};
            for (int64_t t = 0; t < tokens; t++) {
                V value = FN(load)(at(v, t * own.v_strides[2] + i, dtype), dtype, left);
                sums = FMA(value, ALL(own.scores[task * tokens + t]), sums);
            }
            FN(store)(at(out, i, dtype), sums * share, dtype, left);
        });
    }
}

/* ---- the set ---- */

#define LOOP(name, Arguments)                                                 \
    SET static void FN(name)(const Arguments *a, int64_t first, int64_t last) \
    {                                                                         \
        FOR_EACH_TYPE(FN(name##_of), a, first, last)                          \
    }

LOOP(rms_norm, Norm)
LOOP(rms_norm_backward, Norm)
LOOP(gated, Gate)
LOOP(gated_backward, Gate)
LOOP(dropout, Dropout)
LOOP(cross_entropy, Loss)
LOOP(rope, Rotation)
LOOP(glance, Glance)

static const RowKernels FN(set) = {FN(rms_norm), FN(rms_norm_backward), FN(gated), FN(gated_backward),
                                   FN(dropout),  FN(cross_entropy),     FN(rope),  FN(glance)};

#undef SET
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
#undef INLINE
#undef V
#undef I
#undef U
#undef H
#undef ALL
#undef FOR_VECTORS
#undef GELU_ROOT
#undef GELU_CUBE
#undef LOOP
