/* The loops of kquants.c for one set of instructions; included once for each, with TARGET, the functions' attribute, and
FN, their names, defined (and undefined at the end). Vectors go by address: no calling convention is needed for them. */

/* The sum of 16 lanes, halves first. */
TARGET ALWAYS_INLINE float FN(sum)(const F16X *lanes)
{
    float s[KQUANT_LANES];
    memcpy(s, lanes, sizeof s);
    for (int half = KQUANT_LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            s[i] += s[i + half];
    return s[0];
}

TARGET ALWAYS_INLINE void FN(limit)(F16X *v, float least, float largest)
{
    const F16X low = *v - *v + least, high = *v - *v + largest;
    I16X below = *v < low;
    *v = (F16X)(((I16X)low & below) | ((I16X)*v & ~below));
    I16X beyond = *v > high;
    *v = (F16X)(((I16X)high & beyond) | ((I16X)*v & ~beyond));
    *v = (*v + 12582912.0f) - 12582912.0f;
}

/* The codes (x + below) * inverse of a vector. */
TARGET ALWAYS_INLINE void FN(code)(const KQuant *t, const float *x, float below, float inverse, F16X *q)
{
    *q = (*(const F16X_MEMORY *)x + below) * inverse;
    FN(limit)(q, t->least_code, t->largest_code);
}

/* sum w (x - scale q + below)^2 of a group. */
TARGET ALWAYS_INLINE float FN(squares)(const KQuant *t, const float *x, const float *w, float scale, float below)
{
    const float inverse = inverse_of(scale);
    F16X sums = {0};
    for (int64_t v = 0; v < t->vectors; v++, x += KQUANT_LANES, w += KQUANT_LANES) {
        F16X q;
        FN(code)(t, x, below, inverse, &q);
        F16X difference = *(const F16X_MEMORY *)x - scale * q + below;
        F16X term = *(const F16X_MEMORY *)w * difference * difference;
        sums = v ? sums + term : term;
    }
    return FN(sum)(&sums);
}

TARGET ALWAYS_INLINE void FN(range)(const KQuant *t, const float *x, float *least, float *largest)
{
    *least = *largest = *x;
    for (int64_t i = 1; i < t->vectors * KQUANT_LANES; i++) {
        *least = x[i] < *least ? x[i] : *least;
        *largest = x[i] > *largest ? x[i] : *largest;
    }
}

/* Sums of a group with codes (x + below) * inverse: w q, w q q, w x q. */
typedef struct {
    float q, qq, xq;
} FN(Sums);

TARGET ALWAYS_INLINE void FN(sums)(const KQuant *t, const float *x, const float *w, float below, float inverse,
                                   FN(Sums) * out)
{
    F16X sum_q = {0}, sum_qq = {0}, sum_xq = {0};
    for (int64_t v = 0; v < t->vectors; v++, x += KQUANT_LANES, w += KQUANT_LANES) {
        const F16X xs = *(const F16X_MEMORY *)x, ws = *(const F16X_MEMORY *)w;
        F16X q;
        FN(code)(t, x, below, inverse, &q);
        F16X wq = ws * q, wqq = ws * q * q, wxq = ws * xs * q;
        sum_q = v ? sum_q + wq : wq;
        sum_qq = v ? sum_qq + wqq : wqq;
        sum_xq = v ? sum_xq + wxq : wxq;
    }
    out->q = FN(sum)(&sum_q);
    out->qq = FN(sum)(&sum_qq);
    out->xq = FN(sum)(&sum_xq);
}

/* sum w and sum w x of a group. */
TARGET ALWAYS_INLINE void FN(moments)(const KQuant *t, const float *x, const float *w, float *sum_w, float *sum_x)
{
    F16X ones = {0}, xs = {0};
    for (int64_t v = 0; v < t->vectors; v++, x += KQUANT_LANES, w += KQUANT_LANES) {
        F16X one = *(const F16X_MEMORY *)w, wx = one * *(const F16X_MEMORY *)x;
        ones = v ? ones + one : one;
        xs = v ? xs + wx : wx;
    }
    *sum_w = FN(sum)(&ones);
    *sum_x = FN(sum)(&xs);
}

TARGET ALWAYS_INLINE void FN(write)(const KQuant *t, const float *x, float scale, float below, uint8_t *codes)
{
    const float inverse = inverse_of(scale);
    for (int64_t v = 0; v < t->vectors; v++) {
        F16X q;
        FN(code)(t, x + v * KQUANT_LANES, below, inverse, &q);
        for (int i = 0; i < KQUANT_LANES; i++)
            codes[v * KQUANT_LANES + i] = (uint8_t)(int)(q[i] - t->least_code);
    }
}

/* ---- symmetric ---- */

TARGET ALWAYS_INLINE float FN(group_scale)(const KQuant *t, const float *x, const float *w)
{
    float least, largest, gain = 0, s = 0;
    FN(range)(t, x, &least, &largest);
    const float start = inverse_of(largest >= -least ? largest : least);
    for (int64_t i = 0; i < 2 * t->n_factors + REFITS; i++) {
        /* The factors are the least code times the factor, and minus that, as float32 has them. */
        const float inverse = i < 2 * t->n_factors ? start * (i % 2 ? -t->factors[i / 2] : t->factors[i / 2])
                                                   : inverse_of(s);
        FN(Sums) sums;
        FN(sums)(t, x, w, 0.0f, inverse, &sums);
        const float found = quotient_of(sums.xq, sums.qq), gained = found * sums.xq;
        if (gained > gain) {
            gain = gained;
            s = found;
        }
    }
    return s;
}

TARGET ALWAYS_INLINE void FN(symmetric)(const KQuant *t, const float *x, const float *w, int64_t block)
{
    const int64_t groups = t->groups, size = t->vectors * KQUANT_LANES;
    float s[KQUANT_GROUPS] = {0}, n[KQUANT_GROUPS], least, largest;
    uint8_t *codes = t->codes + block * groups * size;
    for (int64_t g = 0; g < groups; g++)
        s[g] = FN(group_scale)(t, x + g * size, w + g * size);
    t->e[block] = 0;
    if (!t->has_scales) {
        t->d[block] = as_half(s[0]);
        t->scales[block] = t->mins[block] = 0;
        FN(write)(t, x, t->d[block], 0.0f, codes);
        return;
    }
    least = largest = s[0];
    for (int64_t g = 1; g < groups; g++) {
        least = s[g] < least ? s[g] : least;
        largest = s[g] > largest ? s[g] : largest;
    }
    float d = as_half((largest >= -least ? largest : least) / t->least_scale);
    const float inverse = inverse_of(d);
    for (int64_t g = 0; g < groups; g++)
        n[g] = whole_of(limited(s[g] * inverse, t->least_scale, t->largest_scale));
    for (int pass = 0; pass < PASSES; pass++) {
        float above = 0, below = 0;
        for (int64_t g = 0; g < groups; g++) {
            const float *xs = x + g * size, *ws = w + g * size, base = n[g];
            float best = FN(squares)(t, xs, ws, d * base, 0.0f);
            for (float move = -1; move <= 1; move += 2) {
                const float tried = limited(base + move, t->least_scale, t->largest_scale);
                const float error = FN(squares)(t, xs, ws, d * tried, 0.0f);
                n[g] = error < best ? tried : n[g];
                best = error < best ? error : best;
            }
            const float by = inverse_of(d * n[g]);
            F16X xa = {0}, aa = {0};
            for (int64_t v = 0; v < t->vectors; v++) {
                const F16X x1 = *(const F16X_MEMORY *)(xs + v * KQUANT_LANES);
                const F16X w1 = *(const F16X_MEMORY *)(ws + v * KQUANT_LANES);
                F16X q;
                FN(code)(t, xs + v * KQUANT_LANES, 0.0f, by, &q);
                const F16X a = n[g] * q, wxa = w1 * x1 * a, waa = w1 * a * a;
                xa = v ? xa + wxa : wxa;
                aa = v ? aa + waa : waa;
            }
            above = g ? above + FN(sum)(&xa) : FN(sum)(&xa);
            below = g ? below + FN(sum)(&aa) : FN(sum)(&aa);
        }
        if (!(below < TINY_SCALE))
            d = as_half(quotient_of(above, below));
    }
    t->d[block] = d;
    for (int64_t g = 0; g < groups; g++) {
        t->scales[block * groups + g] = (int8_t)n[g];
        t->mins[block * groups + g] = 0;
        FN(write)(t, x + g * size, d * n[g], 0.0f, codes + g * size);
    }
}

/* ---- affine ---- */

TARGET ALWAYS_INLINE void FN(group_line)(const KQuant *t, const float *x, const float *w, float *slope, float *offset)
{
    float least, largest, sum_w, sum_x, gain = 0, s = 0;
    FN(range)(t, x, &least, &largest);
    if (t->has_scales && least > 0)
        least = 0;
    float o = least;
    const float inverse = inverse_of(largest - least);
    FN(moments)(t, x, w, &sum_w, &sum_x);
    for (int64_t i = 0; i < t->n_factors + REFITS; i++) {
        const int is_start = i < t->n_factors;
        FN(Sums) c;
        FN(sums)(t, x, w, is_start ? -least : -o, is_start ? inverse * t->factors[i] : inverse_of(s), &c);
        const float det = sum_w * c.qq - c.q * c.q;
        float found_s = quotient_of(sum_w * c.xq - sum_x * c.q, det);
        float found_o = quotient_of(c.qq * sum_x - c.q * c.xq, det);
        if (t->has_scales && found_o > 0) {
            found_s = quotient_of(c.xq, c.qq);
            found_o = 0;
        }
        const float found = found_s * c.xq + found_o * sum_x;
        if (found > gain && found_s > 0) {
            gain = found;
            s = found_s;
            o = found_o;
        }
    }
    *slope = s;
    *offset = o;
}

/* The least squares solution of x = d a - e m with a = n q. */
TARGET ALWAYS_INLINE void FN(refit)(const KQuant *t, const float *x, const float *w, const float *n, const float *m,
                                    float *d, float *e)
{
    const int64_t size = t->vectors * KQUANT_LANES;
    float aa = 0, am = 0, mm = 0, xa = 0, xm = 0;
    for (int64_t g = 0; g < t->groups; g++, x += size, w += size) {
        const float by = inverse_of(*d * n[g]), below = *e * m[g];
        F16X sum_aa = {0}, sum_a = {0}, sum_xa = {0};
        float sum_w, sum_x;
        for (int64_t v = 0; v < t->vectors; v++) {
            const F16X x1 = *(const F16X_MEMORY *)(x + v * KQUANT_LANES);
            const F16X w1 = *(const F16X_MEMORY *)(w + v * KQUANT_LANES);
            F16X q;
            FN(code)(t, x + v * KQUANT_LANES, below, by, &q);
            const F16X a = n[g] * q, waa = w1 * a * a, wa = w1 * a, wxa = w1 * x1 * a;
            sum_aa = v ? sum_aa + waa : waa;
            sum_a = v ? sum_a + wa : wa;
            sum_xa = v ? sum_xa + wxa : wxa;
        }
        FN(moments)(t, x, w, &sum_w, &sum_x);
        aa = g ? aa + FN(sum)(&sum_aa) : FN(sum)(&sum_aa);
        am = g ? am + m[g] * FN(sum)(&sum_a) : m[g] * FN(sum)(&sum_a);
        mm = g ? mm + m[g] * m[g] * sum_w : m[g] * m[g] * sum_w;
        xa = g ? xa + FN(sum)(&sum_xa) : FN(sum)(&sum_xa);
        xm = g ? xm + m[g] * sum_x : m[g] * sum_x;
    }
    const float det = aa * mm - am * am;
    const float both_d = quotient_of(xa * mm - xm * am, det), both_e = quotient_of(xa * am - xm * aa, det);
    if (det > 1e-6f * aa * mm && both_d > 0 && both_e >= 0) {
        *d = as_half(both_d);
        *e = as_half(both_e);
        return;
    }
    const float alone = quotient_of(xa + *e * am, aa);
    if (alone > 0)
        *d = as_half(alone);
}

TARGET ALWAYS_INLINE void FN(affine)(const KQuant *t, const float *x, const float *w, int64_t block)
{
    const int64_t groups = t->groups, size = t->vectors * KQUANT_LANES;
    float s[KQUANT_GROUPS] = {0}, o[KQUANT_GROUPS] = {0}, n[KQUANT_GROUPS], m[KQUANT_GROUPS], d, e;
    uint8_t *codes = t->codes + block * groups * size;
    for (int64_t g = 0; g < groups; g++)
        FN(group_line)(t, x + g * size, w + g * size, s + g, o + g);
    if (!t->has_scales) {
        t->d[block] = as_half(s[0]);
        t->e[block] = as_half(o[0]);
        t->scales[block] = t->mins[block] = 0;
        FN(write)(t, x, t->d[block], -t->e[block], codes);
        return;
    }
    d = s[0];
    e = -o[0];
    for (int64_t g = 1; g < groups; g++) {
        d = s[g] > d ? s[g] : d;
        e = -o[g] > e ? -o[g] : e;
    }
    const float most = t->largest_scale;
    d = as_half(d / most);
    e = as_half(e / most);
    for (int64_t g = 0; g < groups; g++) {
        n[g] = whole_of(limited(s[g] * inverse_of(d), 0, most));
        m[g] = whole_of(limited(-o[g] * inverse_of(e), 0, most));
    }
    for (int pass = 0; pass < PASSES; pass++) {
        for (int64_t g = 0; g < groups; g++) {
            const float *xs = x + g * size, *ws = w + g * size, base_n = n[g], base_m = m[g];
            float best = FN(squares)(t, xs, ws, d * base_n, e * base_m);
            for (float move_n = -1; move_n <= 1; move_n++)
                for (float move_m = -1; move_m <= 1; move_m++) {
                    const float tried_n = limited(base_n + move_n, 0, most), tried_m = limited(base_m + move_m, 0, most);
                    const float error = FN(squares)(t, xs, ws, d * tried_n, e * tried_m);
                    if (error < best) {
                        best = error;
                        n[g] = tried_n;
                        m[g] = tried_m;
                    }
                }
        }
        FN(refit)(t, x, w, n, m, &d, &e);
    }
    t->d[block] = d;
    t->e[block] = e;
    for (int64_t g = 0; g < groups; g++) {
        t->scales[block * groups + g] = (int8_t)n[g];
        t->mins[block * groups + g] = (int8_t)m[g];
        FN(write)(t, x + g * size, d * n[g], e * m[g], codes + g * size);
    }
}

TARGET static void FN(fit)(const KQuant *t, int64_t first, int64_t last)
{
    const int64_t size = t->groups * t->vectors * KQUANT_LANES;
    for (int64_t block = first; block < last; block++) {
        const float *x = t->x + block * size, *w = t->w + block % t->row_blocks * size;
        if (t->affine)
            FN(affine)(t, x, w, block);
        else
            FN(symmetric)(t, x, w, block);
    }
}

#undef TARGET
#undef FN
