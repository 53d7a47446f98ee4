/* The loops of linear_attention.c for one set of instructions; included once for each, with these defined (and
undefined at the end): TARGET, the functions' attribute; FN, their names; LANES32, how many float32 a vector has; ROWS,
how many rows a tile of a product has; FMA, MAX, MIN and TIMES_POWER as in pointwise_loops.h. */

#define F32X FN(floats)
#define MEMORY FN(memory)
#define I32X FN(ints)
#define SPLAT(x) ((x) - (F32X){0})

typedef float F32X __attribute__((vector_size(4 * LANES32)));
typedef F32X MEMORY __attribute__((aligned(4), may_alias)); /* as it lies anywhere among numbers */
typedef int32_t I32X __attribute__((vector_size(4 * LANES32)));

#include "exponential_loops.h"

/* ---- products ---- */

/* `vectors` vectors of ROWS rows of C = A B, added to C if `adds`. */
TARGET ALWAYS_INLINE void FN(tile)(Matrix a, const float *b, int64_t rb, float *c, int64_t rc, int64_t depth, int adds,
                                   const int vectors)
{
    F32X sums[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = adds ? (F32X) * (const MEMORY *)(c + r * rc + v * LANES32) : (F32X){0};
    for (int64_t l = 0; l < depth; l++) {
        const float *row = b + l * rb, *column = a.data + l * a.column;
        F32X b0 = *(const MEMORY *)row, b1 = *(const MEMORY *)(row + (vectors > 1 ? LANES32 : 0));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            F32X x = SPLAT(column[r * a.row]);
            sums[r][0] = FMA(x, b0, sums[r][0]);
            if (vectors > 1)
                sums[r][1] = FMA(x, b1, sums[r][1]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++)
            *(MEMORY *)(c + r * rc + v * LANES32) = sums[r][v];
}

/* C (m, n) = A (m, depth) B (depth, n), added to C if `adds`; m and n are multiples of 16. */
TARGET static void FN(product)(int64_t m, int64_t n, int64_t depth, Matrix a, const float *b, int64_t rb, float *c,
                               int64_t rc, int adds)
{
    for (int64_t j = 0; j < n; j += 2 * LANES32)
        for (int64_t i = 0; i < m; i += ROWS) {
            Matrix rows = {a.data + i * a.row, a.row, a.column};
            if (j + 2 * LANES32 <= n)
                FN(tile)(rows, b + j, rb, c + i * rc + j, rc, depth, adds, 2);
            else
                FN(tile)(rows, b + j, rb, c + i * rc + j, rc, depth, adds, 1);
        }
}

/* The same where A is lower triangular. */
TARGET static void FN(lower_product)(int64_t m, int64_t n, Matrix a, const float *b, int64_t rb, float *c, int64_t rc,
                                     int adds)
{
    for (int64_t i = 0; i < m; i += 16)
        FN(product)(16, n, i + 16, (Matrix){a.data + i * a.row, a.row, a.column}, b, rb, c + i * rc, rc, adds);
}

/* The same where A is upper triangular. */
TARGET static void FN(upper_product)(int64_t m, int64_t n, Matrix a, const float *b, int64_t rb, float *c, int64_t rc,
                                     int adds)
{
    for (int64_t i = 0; i < m; i += 16)
        FN(product)(16, n, m - i, (Matrix){a.data + i * (a.row + a.column), a.row, a.column}, b + i * rb, rb,
                    c + i * rc, rc, adds);
}

/* The part of C (m, m) = A B on and below the diagonal's tiles; what is above them is left as it is. */
TARGET static void FN(product_below)(int64_t m, int64_t depth, Matrix a, const float *b, int64_t rb, float *c, int64_t rc)
{
    for (int64_t i = 0; i < m; i += 16)
        FN(product)(16, i + 16, depth, (Matrix){a.data + i * a.row, a.row, a.column}, b, rb, c + i * rc, rc, 0);
}

/* ---- rows ---- */

TARGET ALWAYS_INLINE float FN(dot)(const float *a, const float *b, int64_t n)
{
    F32X sums = {0};
    for (int64_t i = 0; i < n; i += LANES32)
        sums = FMA(*(const MEMORY *)(a + i), *(const MEMORY *)(b + i), sums);
    float total = 0;
    for (int i = 0; i < LANES32; i++)
        total += sums[i];
    return total;
}

/* y += x by `factor` */
TARGET ALWAYS_INLINE void FN(add)(float *y, const float *x, float factor, int64_t n)
{
    F32X by = SPLAT(factor);
    for (int64_t i = 0; i < n; i += LANES32)
        *(MEMORY *)(y + i) = FMA(by, *(const MEMORY *)(x + i), *(MEMORY *)(y + i));
}

TARGET ALWAYS_INLINE void FN(scale)(float *y, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i += LANES32)
        *(MEMORY *)(y + i) *= SPLAT(factor);
}

/* Solve (I + A) X = B in place, or (I + A)^T X = B; A is below the diagonal of rows of CHUNK. */
TARGET static void FN(solve)(const float *a, float *x, int64_t m, int64_t n, int is_turned)
{
    for (int64_t step = 0; step < m; step += 16) {
        int64_t first = is_turned ? m - 16 - step : step;
        if (step && is_turned)
            FN(product)(16, n, step, (Matrix){a + (first + 16) * CHUNK + first, 1, CHUNK}, x + (first + 16) * n, n,
                        x + first * n, n, 1);
        else if (step)
            FN(product)(16, n, step, (Matrix){a + first * CHUNK, CHUNK, 1}, x, n, x + first * n, n, 1);
        for (int64_t i = 0; i < 16; i++) {
            int64_t row = is_turned ? first + 15 - i : first + i;
            for (int64_t j = is_turned ? row + 1 : first; j < (is_turned ? first + 16 : row); j++)
                FN(add)(x + row * n, x + j * n, is_turned ? a[j * CHUNK + row] : a[row * CHUNK + j], n);
        }
    }
}

/* (m, n) turned to (n, m); both are multiples of 16. */
TARGET static void FN(turn)(const float *from, int64_t m, int64_t n, int64_t row, float *to, int64_t to_row)
{
    for (int64_t i = 0; i < m; i += 16)
        for (int64_t j = 0; j < n; j += 16)
            for (int64_t r = 0; r < 16; r++)
                for (int64_t s = 0; s < 16; s++)
                    to[(j + s) * to_row + i + r] = from[(i + r) * row + j + s];
}

TARGET static void FN(read_rows)(StridedTokens x, int64_t head, Chunk chunk, int64_t m, int64_t width, int64_t dtype,
                                 float *to)
{
    for (int64_t i = 0; i < chunk.length; i++) {
        int64_t place = (chunk.first + i) * x.token + head * x.head;
        if (dtype == FLOAT32)
            memcpy(to + i * width, (const float *)x.data + place, (size_t)width * 4);
        else
            for (int64_t j = 0; j < width; j++)
                to[i * width + j] = float_of((uint32_t)((const uint16_t *)x.data)[place + j] << 16);
    }
    memset(to + chunk.length * width, 0, (size_t)((m - chunk.length) * width) * 4);
}

TARGET static void FN(write_rows)(StridedTokens x, int64_t head, Chunk chunk, int64_t width, int64_t dtype,
                                  const float *from)
{
    for (int64_t i = 0; i < chunk.length; i++) {
        int64_t place = (chunk.first + i) * x.token + head * x.head;
        if (dtype == FLOAT32)
            memcpy((float *)x.data + place, from + i * width, (size_t)width * 4);
        else
            for (int64_t j = 0; j < width; j++)
                ((uint16_t *)x.data)[place + j] = bfloat_of_float(from[i * width + j]);
    }
}

/* ---- linear attention ---- */

/* Divide each row by its length; `lengths` takes one divided by each. */
TARGET static void FN(normalize)(float *x, int64_t m, int64_t width, float *rlengths)
{
    for (int64_t i = 0; i < m; i++) {
        rlengths[i] = 1.0f / sqrtf(FN(dot)(x + i * width, x + i * width, width) + 1e-6f);
        FN(scale)(x + i * width, rlengths[i], width);
    }
}

/* Read a chunk of a head, and compute what does not depend on the state before it. */
TARGET static void FN(load)(const LinearAttention *t, const Work *w, int64_t head, Chunk chunk, int64_t m)
{
    const int64_t dk = t->key_width, dv = t->width, shared = head / (t->heads / t->key_heads);
    FN(read_rows)(t->q, shared, chunk, m, dk, t->dtype, w->q);
    FN(read_rows)(t->k, shared, chunk, m, dk, t->dtype, w->k);
    FN(read_rows)(t->v, head, chunk, m, dv, t->dtype, w->v);
    if (t->normalize) {
        FN(normalize)(w->q, m, dk, w->q_rlengths);
        FN(normalize)(w->k, m, dk, w->k_rlengths);
    }
    FN(scale)(w->q, t->scale, m * dk);
    float c = 0;
    for (int64_t i = 0; i < m; i++) {
        int64_t place = (chunk.first + i) * t->heads + head;
        c += i < chunk.length ? t->g[place] : 0;
        w->c[i] = c;
        w->beta[i] = i < chunk.length ? t->beta[place] : 0;
    }
    for (int64_t i = 0; i < m; i += LANES32) {
        *(MEMORY *)(w->from_start + i) = FN(exp)(*(const MEMORY *)(w->c + i));
        *(MEMORY *)(w->to_end + i) = FN(exp)(c - *(const MEMORY *)(w->c + i));
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j <= i; j += LANES32) /* what is later than i is left out where it is used */
            *(MEMORY *)(w->gaps + i * CHUNK + j) = FN(exp)(MIN(w->c[i] - *(const MEMORY *)(w->c + j), SPLAT(0.0f)));
    FN(turn)(w->k, m, dk, dk, w->k_turned, CHUNK);
    FN(product_below)(m, dk, (Matrix){w->q, dk, 1}, w->k_turned, CHUNK, w->reads, CHUNK);
    if (t->delta)
        FN(product_below)(m, dk, (Matrix){w->k, dk, 1}, w->k_turned, CHUNK, w->pairs, CHUNK);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < m; j++) {
            int64_t place = i * CHUNK + j;
            w->reads[place] = j > i ? 0 : w->reads[place] * w->gaps[place];
            if (t->delta) {
                w->pairs[place] = j >= i ? 0 : w->pairs[place] * w->gaps[place];
                w->solved[place] = -w->beta[i] * w->pairs[place];
            }
        }
}

/* R from the state before the chunk, and `known`, what the state says of the chunk's tokens. */
TARGET static void FN(correct)(const LinearAttention *t, const Work *w, int64_t m, const float *state)
{
    const int64_t dk = t->key_width, dv = t->width;
    memcpy(w->r, w->v, (size_t)(m * dv) * 4);
    if (t->delta && state) {
        FN(product)(m, dv, dk, (Matrix){w->k, dk, 1}, state, dv, w->known, dv, 0);
        for (int64_t i = 0; i < m; i++)
            FN(add)(w->r + i * dv, w->known + i * dv, -w->from_start[i], dv);
    }
    memcpy(w->known, w->r, (size_t)(m * dv) * 4);
    for (int64_t i = 0; i < m; i++)
        FN(scale)(w->r + i * dv, w->beta[i], dv);
    if (t->delta)
        FN(solve)(w->solved, w->r, m, dv, 0);
}

/* The state after the chunk. */
TARGET static void FN(advance)(const LinearAttention *t, const Work *w, int64_t m, const float *state, float *after)
{
    const int64_t dk = t->key_width, dv = t->width;
    memset(after, 0, (size_t)(dk * dv) * 4);
    if (state)
        FN(add)(after, state, w->from_start[m - 1], dk * dv);
    memcpy(w->wide, w->r, (size_t)(m * dv) * 4);
    for (int64_t i = 0; i < m; i++)
        FN(scale)(w->wide + i * dv, w->to_end[i], dv);
    FN(product)(dk, dv, m, (Matrix){w->k, 1, dk}, w->wide, dv, after, dv, 1);
}

TARGET static void FN(forward)(const LinearAttention *t, const Work *w, int64_t head)
{
    const int64_t dk = t->key_width, dv = t->width, size = dk * dv;
    for (int64_t number = 0; number < t->n_chunks; number++) {
        Chunk chunk = t->chunks[number];
        const int64_t m = (chunk.length + 15) / 16 * 16;
        const float *state = chunk.before < 0 ? 0 : w->states + chunk.before * size;
        FN(load)(t, w, head, chunk, m);
        FN(correct)(t, w, m, state);
        FN(advance)(t, w, m, state, w->states + number * size);
        if (!t->out.data)
            continue;
        memset(w->wide, 0, (size_t)(m * dv) * 4);
        if (state)
            FN(product)(m, dv, dk, (Matrix){w->q, dk, 1}, state, dv, w->wide, dv, 0);
        for (int64_t i = 0; i < m; i++)
            FN(scale)(w->wide + i * dv, w->from_start[i], dv);
        FN(lower_product)(m, dv, (Matrix){w->reads, CHUNK, 1}, w->r, dv, w->wide, dv, 1);
        FN(write_rows)(t->out, head, chunk, dv, t->dtype, w->wide);
    }
}

/* The gradient of x from that of its normalised row, which is x `rlength`. */
TARGET ALWAYS_INLINE void FN(normalize_backward)(float *grad, const float *unit, float rlength, int64_t width)
{
    FN(add)(grad, unit, -FN(dot)(grad, unit, width), width);
    FN(scale)(grad, rlength, width);
}

/* The gradients of one chunk; `after` is that of the state behind it, `before` takes that of the state before it. */
TARGET static void FN(derive)(const LinearAttention *t, const Work *w, int64_t head, Chunk chunk, int64_t slice,
                              const float *state, const float *after, float *before)
{
    const int64_t dk = t->key_width, dv = t->width, m = (chunk.length + 15) / 16 * 16;
    const int64_t shared = head / (t->heads / t->key_heads), own = shared * t->slices + slice;
    FN(load)(t, w, head, chunk, m);
    FN(correct)(t, w, m, state);
    FN(read_rows)(t->grad, head, chunk, m, dv, t->dtype, w->grad);
    float *dr = w->dr, *wide = w->wide, *y = w->y, last = 0;
    /* r: what reads it within the chunk, and the state after it */
    FN(product)(m, dv, dk, (Matrix){w->k, dk, 1}, after, dv, dr, dv, 0);
    for (int64_t i = 0; i < m; i++)
        FN(scale)(dr + i * dv, w->to_end[i], dv);
    FN(upper_product)(m, dv, (Matrix){w->reads, 1, CHUNK}, w->grad, dv, dr, dv, 1);
    if (t->delta)
        FN(solve)(w->solved, dr, m, dv, 1);
    /* q and k within the chunk: dq = Y K, dk = Y^T Q */
    FN(turn)(w->r, m, dv, dv, w->r_turned, CHUNK);
    FN(product_below)(m, dv, (Matrix){w->grad, dv, 1}, w->r_turned, CHUNK, y, CHUNK);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < m; j++)
            y[i * CHUNK + j] = j > i ? 0 : y[i * CHUNK + j] * w->gaps[i * CHUNK + j];
    FN(lower_product)(m, dk, (Matrix){y, CHUNK, 1}, w->k, dk, w->dq, dk, 0);
    FN(upper_product)(m, dk, (Matrix){y, 1, CHUNK}, w->q, dk, w->dk_late, dk, 0);
    /* k in the state after the chunk: dk_late += to_end R after^T */
    FN(turn)(after, dk, dv, dv, w->state_turned, dk);
    FN(product)(m, dk, dv, (Matrix){w->r, dv, 1}, w->state_turned, dk, w->narrow, dk, 0);
    for (int64_t i = 0; i < m; i++) {
        FN(add)(w->dk_late + i * dk, w->narrow + i * dk, w->to_end[i], dk);
        last += w->to_end[i] * FN(dot)(w->k + i * dk, w->narrow + i * dk, dk);
        w->d_beta[i] = FN(dot)(dr + i * dv, w->known + i * dv, dv);
    }
    memset(w->dk_early, 0, (size_t)(m * dk) * 4);
    if (t->delta) { /* the pairs of k that correct each other */
        FN(product_below)(m, dv, (Matrix){dr, dv, 1}, w->r_turned, CHUNK, y, CHUNK);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < m; j++) {
                int64_t place = i * CHUNK + j;
                float d = j >= i ? 0 : -y[place];
                w->d_beta[i] += d * w->pairs[place];
                y[place] = j >= i ? 0 : d * w->beta[i] * w->gaps[place];
            }
        FN(lower_product)(m, dk, (Matrix){y, CHUNK, 1}, w->k, dk, w->dk_early, dk, 0);
        FN(upper_product)(m, dk, (Matrix){y, 1, CHUNK}, w->k, dk, w->dk_late, dk, 1);
    }
    for (int64_t i = 0; i < m; i++)
        FN(scale)(dr + i * dv, w->beta[i], dv); /* from here on the gradient of v */
    FN(write_rows)(t->dv, head, chunk, dv, t->dtype, dr);
    if (state) { /* the state before the chunk, and what reads it */
        FN(add)(before, after, w->from_start[m - 1], dk * dv);
        last += w->from_start[m - 1] * FN(dot)(after, state, dk * dv);
        memcpy(wide, w->grad, (size_t)(m * dv) * 4);
        for (int64_t i = 0; i < m; i++) {
            FN(scale)(wide + i * dv, w->from_start[i], dv);
            FN(scale)(dr + i * dv, -w->from_start[i], dv);
        }
        FN(product)(dk, dv, m, (Matrix){w->q, 1, dk}, wide, dv, before, dv, 1);
        FN(turn)(state, dk, dv, dv, w->state_turned, dk);
        FN(product)(m, dk, dv, (Matrix){wide, dv, 1}, w->state_turned, dk, w->dq, dk, 1);
        if (t->delta) {
            FN(product)(dk, dv, m, (Matrix){w->k, 1, dk}, dr, dv, before, dv, 1);
            FN(product)(m, dk, dv, (Matrix){dr, dv, 1}, w->state_turned, dk, w->dk_early, dk, 1);
        }
    }
    float sum = last; /* of the gradients of the sums of g from a token to the end of the chunk */
    for (int64_t i = m - 1; i >= 0; i--) {
        float *d_q = w->dq + i * dk, *early = w->dk_early + i * dk, *late = w->dk_late + i * dk;
        const float *q = w->q + i * dk, *k = w->k + i * dk;
        sum += FN(dot)(q, d_q, dk) + FN(dot)(k, early, dk) - FN(dot)(k, late, dk);
        if (i >= chunk.length)
            continue;
        int64_t place = (chunk.first + i) * t->heads + head;
        t->dg[place] = sum;
        t->dbeta[place] = w->d_beta[i];
        FN(add)(early, late, 1, dk);
        FN(scale)(d_q, t->scale, dk);
        if (t->normalize) {
            FN(scale)(w->q + i * dk, 1 / t->scale, dk);
            FN(normalize_backward)(d_q, q, w->q_rlengths[i], dk);
            FN(normalize_backward)(early, k, w->k_rlengths[i], dk);
        }
        int64_t row = ((chunk.first + i) * t->key_heads * t->slices + own) * dk;
        FN(add)(t->dq + row, d_q, 1, dk);
        FN(add)(t->dk + row, early, 1, dk);
    }
}

TARGET static void FN(backward)(const LinearAttention *t, const Work *w, int64_t head, int64_t slice)
{
    const int64_t size = t->key_width * t->width;
    FN(forward)(t, w, head);
    memset(w->d_states, 0, (size_t)((t->n_chunks + 1) * size) * 4);
    for (int64_t number = t->n_chunks - 1; number >= 0; number--) {
        Chunk chunk = t->chunks[number];
        const int has_state = chunk.before >= 0;
        FN(derive)(t, w, head, chunk, slice, has_state ? w->states + chunk.before * size : 0,
                   w->d_states + number * size, w->d_states + (has_state ? chunk.before : t->n_chunks) * size);
    }
}

/* ---- short convolution ---- */

TARGET ALWAYS_INLINE F32X FN(read)(const void *from, int64_t place, int64_t dtype)
{
    F32X wide;
    if (dtype == FLOAT32)
        memcpy(&wide, (const float *)from + place, sizeof wide);
    else
        for (int i = 0; i < LANES32; i++)
            wide[i] = float_of((uint32_t)((const uint16_t *)from)[place + i] << 16);
    return wide;
}

TARGET ALWAYS_INLINE void FN(write)(void *to, int64_t place, int64_t dtype, F32X wide)
{
    if (dtype == FLOAT32)
        memcpy((float *)to + place, &wide, sizeof wide);
    else
        for (int i = 0; i < LANES32; i++)
            ((uint16_t *)to)[place + i] = bfloat_of_float(wide[i]);
}

/* What a token's filter gives before the activation, for a vector of channels. */
TARGET ALWAYS_INLINE F32X FN(filter)(const Convolution *t, int64_t token, int64_t channel)
{
    F32X sum = {0};
    if (t->bias)
        sum = *(const MEMORY *)(t->bias + channel);
    for (int64_t steps = 0; steps < t->taps; steps++) {
        int64_t from = t->earlier[steps * t->tokens + token];
        if (from < t->tokens) {
            F32X weight = *(const MEMORY *)(t->weight + steps * t->channels + channel);
            sum = FMA(FN(read)(t->x, from * t->stride + channel, t->dtype), weight, sum);
        }
    }
    return sum;
}

TARGET static void FN(convolve)(const Convolution *t, int64_t first, int64_t last)
{
    for (int64_t token = first; token < last; token++)
        for (int64_t channel = 0; channel < t->channels; channel += LANES32) {
            F32X sum = FN(filter)(t, token, channel);
            FN(write)(t->out, token * t->channels + channel, t->dtype, t->silu ? sum * FN(sigmoid)(sum) : sum);
        }
}

/* Of the vectors of channels [first, last); `sums` (tokens, LANES32) takes the gradient of x. */
TARGET static void FN(convolve_backward)(const Convolution *t, float *sums, int64_t first, int64_t last)
{
    for (int64_t channel = first * 16; channel < last * 16; channel += LANES32) {
        memset(sums, 0, (size_t)(t->tokens * LANES32) * 4);
        F32X d_bias = {0};
        for (int64_t token = 0; token < t->tokens; token++) {
            F32X grad = FN(read)(t->grad, token * t->grad_stride + channel, t->dtype);
            if (t->silu) {
                F32X sum = FN(filter)(t, token, channel), gate = FN(sigmoid)(sum);
                grad *= gate * (1.0f + sum * (1.0f - gate));
            }
            d_bias += grad;
            for (int64_t steps = 0; steps < t->taps; steps++) {
                int64_t from = t->earlier[steps * t->tokens + token], place = steps * t->channels + channel;
                if (from == t->tokens)
                    continue;
                MEMORY *sum = (MEMORY *)(sums + from * LANES32), *d_weight = (MEMORY *)(t->d_weight + place);
                *sum = FMA(grad, *(const MEMORY *)(t->weight + place), *sum);
                *d_weight = FMA(grad, FN(read)(t->x, from * t->stride + channel, t->dtype), *d_weight);
            }
        }
        *(MEMORY *)(t->d_bias + channel) = d_bias;
        for (int64_t token = 0; token < t->tokens; token++)
            FN(write)(t->out, token * t->channels + channel, t->dtype, *(const MEMORY *)(sums + token * LANES32));
    }
}

static const LinearAttentionLoops FN(set) = {FN(forward), FN(backward), FN(convolve), FN(convolve_backward)};

#undef F32X
#undef MEMORY
#undef I32X
#undef SPLAT
#undef TARGET
#undef FN
#undef LANES32
#undef ROWS
#undef FMA
#undef MAX
#undef MIN
#undef TIMES_POWER
