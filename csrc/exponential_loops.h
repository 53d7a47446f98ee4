/* The exponential and the logistic function of a vector, for the loops of one set of instructions: included with what
pointwise_loops.h names defined, and F32X, I32X and SPLAT. */

/* e^x = 2^n e^r with |r| <= ln 2 / 2, and a polynomial of least relative error for e^r (Remez: 2e-8 as rounded here).
To 0 below -104 and to infinity above 89. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. */
TARGET ALWAYS_INLINE F32X FN(exp)(F32X x)
{
    const float to_integer = 12582912.0f;
    x = MIN(SPLAT(89.0f), MAX(SPLAT(-104.0f), x));
    F32X shifted = FMA(x, SPLAT(1.44269504f), SPLAT(to_integer));
    F32X n = shifted - to_integer;
    F32X r = FMA(n, SPLAT(2.12194440e-4f),
                 FMA(n, SPLAT(-0.693359375f), x)); /* ln 2 in two parts: n times the first is exact */
    F32X p = FMA(SPLAT(1.3836835e-3f), r, SPLAT(8.374824e-3f));
    p = FMA(p, r, SPLAT(4.1668225e-2f));
    p = FMA(p, r, SPLAT(1.666642e-1f));
    p = FMA(p, r, SPLAT(4.999999e-1f));
    p = FMA(p, r, SPLAT(1.0f));
    p = FMA(p, r, SPLAT(1.0f));
#if defined(TIMES_POWER)
    return TIMES_POWER(p, n);
#else
    I32X power = (I32X)shifted - (I32X)SPLAT(to_integer),
         half = power >> 1; /* 2^n itself may lie outside the normal numbers */
    return p * (F32X)((half + 127) << 23) * (F32X)((power - half + 127) << 23);
#endif
}

TARGET ALWAYS_INLINE F32X FN(sigmoid)(F32X x)
{
    return 1.0f / (1.0f + FN(exp)(-x));
}
