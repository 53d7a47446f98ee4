/* Causal attention over documents, forward and backward, in AVX512-BF16.

Everything is turned so that queries lie along the lanes: scores are S^T = K Q^T, `(keys, queries)`. Maxima, sums and
masks of the softmax are then vertical, and each of the products is one kernel: 8 rows by up to 3 vectors of float32
sums, rows taken as pairs of bfloat16 that are broadcast, columns as vectors of pairs.

    forward    S^T = K Q^T      O^T += V^T P^T
    backward   S^T = K Q^T      dP^T = V dO^T      dV += P^T dO      dK += dS^T Q      dQ^T += K^T dS^T

    P = exp(S scale - lse)      dS = P (dP - rowsum(dO O)), times scale at the end

A block of QUERIES queries meets the keys it sees, KEYS at a time; nothing larger than QUERIES x KEYS is held. Queries
past the end of a segment are zeros and are not written; keys past it are hidden by causality. A task is a head of a
document (forward), or all heads that share keys (backward): any number of threads take the tasks one by one.

Scratch memory holds the keys of one path of the document's tree, from the root to the end of a segment, and the sums of
their gradients. Segments come in pre-order, so the next segment's ancestors are there already and it overwrites those
that are not among them; the sums of a segment are written when nothing that sees it is left. */

#include "attention.h"

#ifndef HAS_BF16

EXPORT int nybble_attend_available(void)
{
    return 0;
}
EXPORT int64_t nybble_attend_scratch(int64_t width, int64_t longest)
{
    return width * longest * 0;
}
EXPORT void nybble_attend(Attention *t, void *scratch)
{
    (void)t, (void)scratch;
}
EXPORT void nybble_attend_backward(Attention *t, void *scratch)
{
    (void)t, (void)scratch;
}

#else

enum { QUERIES = 96, KEYS = 128 }; /* of a block: its scores (48 KiB) and operands stay in the second-level cache */
enum { ROWS = 8, VECTOR = 16 };    /* of a tile; 8 x 3 vectors of sums leave registers for operands */

#define LOG2E 1.44269504088896341f
#define LN2 0.693147180559945309f

static inline int64_t padded_rows(int64_t n)
{
    return (n + ROWS - 1) / ROWS * ROWS;
}

/* ---- elementary functions ---- */

/* Results are rounded to bfloat16, which takes shorter polynomials than those of pointwise_loops.h. */

TARGET_ATTENTION ALWAYS_INLINE __m512 exp2_512(__m512 x)
{
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f)); /* hidden scores are minus infinity: 2^-200 is 0 */
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.3333558e-3f), _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* Natural logarithm of a positive number: 2 artanh(z) of z = (m - 1) / (m + 1), m in [0.75, 1.5). */
TARGET_ATTENTION ALWAYS_INLINE __m512 log_512(__m512 x)
{
    __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero), one = _mm512_set1_ps(1.0f);
    __m512 exponent = _mm512_getexp_ps(_mm512_div_ps(x, m));
    __m512 z = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(z, z);
    __m512 p = _mm512_fmadd_ps(square, _mm512_set1_ps(2.0f / 9), _mm512_set1_ps(2.0f / 7));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / 5));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / 3));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f));
    return _mm512_fmadd_ps(exponent, _mm512_set1_ps(LN2), _mm512_mul_ps(p, z));
}

TARGET_ATTENTION ALWAYS_INLINE __m512 tanh_512(__m512 x)
{
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 power = exp2_512(_mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(2 * LOG2E)), _mm512_set1_ps(60.0f)));
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(power, one)));
}

/* ---- products ---- */

/* c (+)= sum over steps of pairs, 8 rows by `vectors`; a's rows are `am` pairs apart and its steps `ak`. */
TARGET_ATTENTION ALWAYS_INLINE void multiply_tile(int vectors, int add, const uint32_t *a, int64_t am, int64_t ak,
                                                  const uint32_t *b, int64_t bk, int64_t steps, float *c, int64_t cm)
{
    __m512 sums[ROWS][3];
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < vectors; v++)
            sums[row][v] = add ? _mm512_loadu_ps(c + row * cm + VECTOR * v) : _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; step++, a += ak, b += bk) {
        __m512i columns[3];
        for (int v = 0; v < vectors; v++)
            columns[v] = _mm512_loadu_si512(b + VECTOR * v);
        for (int row = 0; row < ROWS; row++) {
            __m512i pair = _mm512_set1_epi32((int32_t)a[row * am]);
            for (int v = 0; v < vectors; v++)
                sums[row][v] = _mm512_dpbf16_ps(sums[row][v], (__m512bh)pair, (__m512bh)columns[v]);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(c + row * cm + VECTOR * v, sums[row][v]);
}

/* The same for vectors [first, last) of b and c; three at a time, or two where one would be left alone. */
TARGET_ATTENTION ALWAYS_INLINE void multiply_strip(int add, const uint32_t *a, int64_t am, int64_t ak,
                                                   const uint32_t *b, int64_t bk, int64_t steps, float *c, int64_t cm,
                                                   int64_t first, int64_t last)
{
    for (int64_t v = first, n; v < last; v += n) {
        int64_t left = last - v;
        n = left == 3 || left > 4 ? 3 : left == 1 ? 1 : 2;
        if (n == 3)
            multiply_tile(3, add, a, am, ak, b + VECTOR * v, bk, steps, c + VECTOR * v, cm);
        else if (n == 2)
            multiply_tile(2, add, a, am, ak, b + VECTOR * v, bk, steps, c + VECTOR * v, cm);
        else
            multiply_tile(1, add, a, am, ak, b + VECTOR * v, bk, steps, c + VECTOR * v, cm);
    }
}

/* ---- layouts ---- */

/* Columns become rows. */
TARGET_ATTENTION ALWAYS_INLINE void transpose(__m512i *r)
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

/* n rows, QUERIES at most, as `(width / 2, QUERIES)` pairs along the width; zeros fill the last vector. */
TARGET_ATTENTION static void pack_turned(const uint16_t *from, int64_t stride, int64_t n, int64_t width, uint32_t *to)
{
    for (int64_t row = 0; row < n; row += VECTOR)
        for (int64_t column = 0; column < width / 2; column += VECTOR) {
            __m512i block[16];
            __mmask16 inside = width / 2 - column >= VECTOR ? 0xFFFF : 0xFF;
            for (int i = 0; i < VECTOR; i++)
                block[i] = row + i < n ? _mm512_maskz_loadu_epi32(inside, from + (row + i) * stride + 2 * column)
                                       : _mm512_setzero_si512();
            transpose(block);
            for (int i = 0; i < (inside == 0xFF ? VECTOR / 2 : VECTOR); i++)
                _mm512_storeu_si512(to + (column + i) * QUERIES + row, block[i]);
        }
}

TARGET_ATTENTION ALWAYS_INLINE __m512i widened(const uint16_t *from)
{
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)from));
}

/* Rows [first, n), of which `from` is the first, as `(rows / 2, width)` pairs along the rows, `rows` a multiple of 2
with zeros from n on; row first - 1 keeps its half of a pair. */
TARGET_ATTENTION static void pack_pairs(const uint16_t *from, int64_t stride, int64_t first, int64_t n, int64_t rows,
                                        int64_t width, uint32_t *to)
{
    to += first / 2 * width;
    for (int64_t row = first / 2 * 2; row < rows; row += 2)
        for (int64_t column = 0; column < width; column += VECTOR, to += VECTOR) {
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (row < first)
                even = _mm512_and_si512(_mm512_loadu_si512(to), _mm512_set1_epi32(0xFFFF));
            else if (row < n)
                even = widened(from + (row - first) * stride + column);
            if (row + 1 < n)
                odd = widened(from + (row + 1 - first) * stride + column);
            _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

/* n rows one after another, zeros up to `rows`. */
static void pack_rows(const uint16_t *from, int64_t stride, int64_t n, int64_t rows, int64_t width, uint16_t *to)
{
    for (int64_t row = 0; row < n; row++)
        memcpy(to + row * width, from + row * stride, (size_t)width * 2);
    memset(to + n * width, 0, (size_t)((rows - n) * width) * 2);
}

/* `(width, QUERIES)` sums times a factor for each query, rounded, as n rows. */
TARGET_ATTENTION static void write_turned(const float *sums, const float *factors, int64_t n, int64_t width,
                                          uint16_t *to, int64_t stride)
{
    for (int64_t row = 0; row < n; row += VECTOR)
        for (int64_t column = 0; column < width; column += VECTOR) {
            __m512i block[16];
            __m512 factor = _mm512_loadu_ps(factors + row);
            for (int i = 0; i < VECTOR; i++)
                block[i] =
                    _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(sums + (column + i) * QUERIES + row), factor));
            transpose(block);
            for (int64_t i = 0; i < min_i64(VECTOR, n - row); i++)
                _mm256_storeu_si256((__m256i *)(void *)(to + (row + i) * stride + column),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(block[i])));
        }
}

TARGET_ATTENTION static void write_rows(const float *sums, float factor, int64_t n, int64_t width, uint16_t *to,
                                        int64_t stride)
{
    for (int64_t row = 0; row < n; row++)
        for (int64_t column = 0; column < width; column += VECTOR) {
            __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums + row * width + column), _mm512_set1_ps(factor));
            _mm256_storeu_si256((__m256i *)(void *)(to + row * stride + column), (__m256i)_mm512_cvtneps_pbh(sum));
        }
}

/* ---- a block of scores ---- */

typedef struct {
    int64_t query, queries; /* the first, and how many; counted along the path, as keys are */
    int64_t key, keys;      /* the first, and how many, a multiple of ROWS; both may lie past the end */
    int64_t window;
} Block;

/* Which vectors of queries see any of `count` keys from `key` on: [first, last). */
static inline int64_t first_vector(const Block *b, int64_t key)
{
    return max_i64(0, key - b->query) / VECTOR;
}
static inline int64_t last_vector(const Block *b, int64_t key, int64_t count)
{
    int64_t all = (b->queries + VECTOR - 1) / VECTOR, blind = key + count - 1 - b->query; /* + window: does not see */
    return b->window >= QUERIES - blind ? all : max_i64(0, min_i64(all, (blind + b->window + VECTOR - 1) / VECTOR));
}

/* Lanes of a vector of queries that see a key. */
static inline uint16_t seen(const Block *b, int64_t key, int64_t vector)
{
    int64_t first = key - (b->query + VECTOR * vector); /* lanes [first, first + window) */
    int64_t last = b->window >= VECTOR - first ? VECTOR : first + b->window;
    uint32_t from = first <= 0 ? 0xFFFFu : first >= VECTOR ? 0 : 0xFFFFu << first;
    uint32_t to = last <= 0 ? 0 : (1u << last) - 1;
    return (uint16_t)(from & to);
}

/* All queries of the block see all its keys. */
static inline int is_full(const Block *b)
{
    return b->key + b->keys - 1 <= b->query && b->window > b->query + QUERIES - 1 - b->key;
}

/* c = rows x turned, `(keys, QUERIES)`; vectors of queries that see none of a tile's keys are left as they are. */
TARGET_ATTENTION static void score_block(const Block *b, const uint16_t *rows, const uint32_t *turned, int64_t width,
                                         float *c)
{
    for (int64_t key = 0; key < b->keys; key += ROWS)
        multiply_strip(0, (const uint32_t *)(const void *)(rows + (b->key + key) * width), width / 2, 1, turned,
                       QUERIES, width / 2, c + key * QUERIES, QUERIES, first_vector(b, b->key + key),
                       last_vector(b, b->key + key, ROWS));
}

/* c += pairs^T x shares, `(width, QUERIES)`: pairs lie along the block's keys in both. */
TARGET_ATTENTION static void gather_values(const Block *b, const uint32_t *pairs, const uint32_t *shares, int64_t width,
                                           float *c)
{
    int64_t vectors = (b->queries + VECTOR - 1) / VECTOR;
    pairs += b->key / 2 * width;
    for (int64_t v = 0; v < vectors; v += 3) {
        int64_t last = min_i64(vectors, v + 3), steps = (min_i64(b->keys, b->query + VECTOR * last - b->key) + 1) / 2;
        for (int64_t row = 0; steps > 0 && row < width; row += ROWS)
            multiply_strip(1, pairs + row, 1, width, shares, QUERIES, steps, c + row * QUERIES, QUERIES, v, last);
    }
}

/* c += shares x pairs, `(keys, width)`: pairs lie along the block's queries in both. */
TARGET_ATTENTION static void scatter_gradients(const Block *b, const uint16_t *shares, const uint32_t *pairs,
                                               int64_t width, float *c)
{
    for (int64_t key = 0; key < b->keys; key += ROWS) {
        int64_t first = first_vector(b, b->key + key), last = last_vector(b, b->key + key, ROWS), from = first * VECTOR;
        if (first < last)
            multiply_strip(1, (const uint32_t *)(const void *)(shares + key * QUERIES + from), QUERIES / 2, 1,
                           pairs + from / 2 * width, width, (last - first) * VECTOR / 2, c + (b->key + key) * width,
                           width, 0, width / VECTOR);
    }
}

/* scores become softcap / scale * tanh(scores scale / softcap), in place. */
TARGET_ATTENTION static void apply_softcap(const Block *b, float ratio, float *scores)
{
    __m512 in = _mm512_set1_ps(ratio), out = _mm512_set1_ps(1 / ratio);
    for (int64_t key = 0; key < b->keys; key++)
        for (int64_t v = first_vector(b, b->key + key); v < last_vector(b, b->key + key, 1); v++) {
            float *at = scores + key * QUERIES + VECTOR * v;
            _mm512_storeu_ps(at, _mm512_mul_ps(out, tanh_512(_mm512_mul_ps(in, _mm512_loadu_ps(at)))));
        }
}

TARGET_ATTENTION ALWAYS_INLINE __m512i interleaved(__m512 even, __m512 odd)
{
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd)), 16));
}

/* ---- forward ---- */

typedef struct {
    float largest[QUERIES], sums[QUERIES]; /* of the scores before scaling; of the exponentials */
} Softmax;

/* One step of the softmax over a block: shares of it against the new maxima, as pairs along the keys; what was summed
before shrinks. */
TARGET_ATTENTION static void softmax_step(const Block *b, const float *scores, float factor, Softmax *s,
                                          uint32_t *shares, int64_t width, float *turned)
{
    int full = is_full(b);
    __m512 none = _mm512_set1_ps(-__builtin_inff()), scaling = _mm512_set1_ps(factor);
    for (int64_t v = 0; v < (b->queries + VECTOR - 1) / VECTOR; v++) {
        __m512 before = _mm512_loadu_ps(s->largest + VECTOR * v), largest = before, sum = _mm512_setzero_ps();
        for (int64_t key = 0; key < b->keys; key++) {
            __mmask16 mask = full ? 0xFFFF : seen(b, b->key + key, v);
            __m512 score = _mm512_loadu_ps(scores + key * QUERIES + VECTOR * v);
            largest = _mm512_mask_max_ps(largest, mask, largest, score);
        }
        /* Differences first: the largest share is then 2^0 however large the scores. Nothing seen yet: 0, not infinity. */
        __m512 zero = _mm512_mask_mov_ps(largest, _mm512_cmp_ps_mask(largest, none, _CMP_EQ_OQ), _mm512_setzero_ps());
        for (int64_t key = 0; key < b->keys; key += 2) {
            __m512 two[2];
            for (int i = 0; i < 2; i++) {
                __mmask16 mask = full ? 0xFFFF : seen(b, b->key + key + i, v);
                __m512 score = _mm512_mask_loadu_ps(none, mask, scores + (key + i) * QUERIES + VECTOR * v);
                two[i] = exp2_512(_mm512_mul_ps(_mm512_sub_ps(score, zero), scaling));
                sum = _mm512_add_ps(sum, two[i]);
            }
            _mm512_storeu_si512(shares + key / 2 * QUERIES + VECTOR * v, interleaved(two[0], two[1]));
        }
        __m512 shrink = exp2_512(_mm512_mul_ps(_mm512_sub_ps(before, zero), scaling));
        _mm512_storeu_ps(s->largest + VECTOR * v, largest);
        _mm512_storeu_ps(s->sums + VECTOR * v, _mm512_fmadd_ps(_mm512_loadu_ps(s->sums + VECTOR * v), shrink, sum));
        if (_mm512_cmp_ps_mask(before, largest, _CMP_NEQ_UQ))
            for (int64_t row = 0; row < width; row++) {
                float *at = turned + row * QUERIES + VECTOR * v;
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), shrink));
            }
    }
}

typedef struct {
    uint16_t *k_rows, *v_rows;        /* (keys of the path, width) */
    uint32_t *k_pairs, *v_pairs;      /* (keys / 2, width) */
    float *dk, *dv;                   /* (keys, width) */
    uint32_t *q_turned, *grad_turned; /* (width / 2, QUERIES) */
    uint32_t *q_pairs, *grad_pairs;   /* (QUERIES / 2, width) */
    float *turned;                    /* (width, QUERIES) sums of the result, or of dQ */
    float *scores, *d_scores;         /* (KEYS, QUERIES) */
    uint16_t *p_rows, *ds_rows;       /* the same, rounded */
    uint32_t *pairs;                  /* (KEYS / 2, QUERIES) */
} Scratch;

static void *carve(char **at, int64_t bytes)
{
    void *here = *at;
    *at += (bytes + 63) / 64 * 64 + 64; /* a line apart: rows of powers of two do not meet in the cache */
    return here;
}

static int64_t lay_out(Scratch *s, char *at, int64_t width, int64_t longest)
{
    char *start = at;
    int64_t rows = padded_rows(longest) + KEYS, held = 2 * rows * width;
    s->k_rows = carve(&at, held), s->v_rows = carve(&at, held);
    s->k_pairs = carve(&at, held), s->v_pairs = carve(&at, held);
    s->q_turned = carve(&at, 2 * width * QUERIES), s->grad_turned = carve(&at, 2 * width * QUERIES);
    s->q_pairs = carve(&at, 2 * width * QUERIES), s->grad_pairs = carve(&at, 2 * width * QUERIES);
    s->turned = carve(&at, 4 * width * QUERIES);
    s->scores = carve(&at, 4 * KEYS * QUERIES), s->d_scores = carve(&at, 4 * KEYS * QUERIES);
    s->p_rows = carve(&at, 2 * KEYS * QUERIES), s->ds_rows = carve(&at, 2 * KEYS * QUERIES);
    s->pairs = carve(&at, 2 * KEYS * QUERIES);
    s->dk = carve(&at, 2 * held), s->dv = carve(&at, 2 * held);
    return at - start;
}

static inline const uint16_t *row_of(const StridedHeads *r, int64_t token, int64_t head)
{
    return r->data + token * r->token + head * r->head;
}

static inline uint16_t *writable(const StridedHeads *r, int64_t token, int64_t head)
{
    return (uint16_t *)row_of(r, token, head);
}

TARGET_ATTENTION static void forward_block(const Attention *t, const Scratch *s, Block b, int64_t start, int64_t head)
{
    int64_t width = t->width, end = b.query + b.queries, oldest = max_i64(0, b.query - t->window + 1) / ROWS * ROWS;
    float factor = t->scale * LOG2E, inverse[QUERIES];
    Softmax softmax;
    memset(softmax.sums, 0, sizeof softmax.sums);
    for (int i = 0; i < QUERIES; i++)
        softmax.largest[i] = -__builtin_inff();
    memset(s->turned, 0, (size_t)(width * QUERIES) * 4);
    pack_turned(row_of(&t->q, start + b.query, head), t->q.token, b.queries, width, s->q_turned);
    for (b.key = oldest; b.key < end; b.key += KEYS) {
        b.keys = padded_rows(min_i64(KEYS, end - b.key));
        score_block(&b, s->k_rows, s->q_turned, width, s->scores);
        if (t->softcap > 0)
            apply_softcap(&b, t->scale / t->softcap, s->scores);
        softmax_step(&b, s->scores, factor, &softmax, s->pairs, width, s->turned);
        gather_values(&b, s->v_pairs, s->pairs, width, s->turned);
    }
    for (int64_t i = 0; i < b.queries; i += VECTOR) {
        __m512 sums = _mm512_loadu_ps(softmax.sums + i), largest = _mm512_loadu_ps(softmax.largest + i);
        __m512 lse = _mm512_add_ps(_mm512_mul_ps(largest, _mm512_set1_ps(t->scale)), log_512(sums));
        __mmask16 inside = b.queries - i >= VECTOR ? 0xFFFF : (__mmask16)((1u << (b.queries - i)) - 1);
        _mm512_storeu_ps(inverse + i, _mm512_div_ps(_mm512_set1_ps(1.0f), sums));
        _mm512_mask_storeu_ps(t->lse + head * t->tokens + start + b.query + i, inside, lse);
    }
    write_turned(s->turned, inverse, b.queries, width, writable(&t->out, start + b.query, head), t->out.token);
}

/* ---- backward ---- */

/* P and dS of a block, rounded: by rows both, and dS as pairs along the keys. */
TARGET_ATTENTION static void differentiate_scores(const Block *b, const Attention *t, const Scratch *s,
                                                  const float *lse, const float *means)
{
    int full = is_full(b);
    float ratio = t->softcap > 0 ? t->scale / t->softcap : 0;
    __m512 scaling = _mm512_set1_ps(t->scale), capping = _mm512_set1_ps(ratio), one = _mm512_set1_ps(1.0f);
    for (int64_t key = 0; key < b->keys; key += 2)
        for (int64_t v = 0; v < (b->queries + VECTOR - 1) / VECTOR; v++) {
            __m512 d[2], offset = _mm512_loadu_ps(lse + VECTOR * v), mean = _mm512_loadu_ps(means + VECTOR * v);
            for (int i = 0; i < 2; i++) {
                int64_t at = (key + i) * QUERIES + VECTOR * v;
                __mmask16 mask = full ? 0xFFFF : seen(b, b->key + key + i, v);
                __m512 score = _mm512_maskz_loadu_ps(mask, s->scores + at);
                /* Rounded as in lse, never more than it: P <= 1 however large the scores. */
                __m512 below = _mm512_sub_ps(_mm512_mul_ps(score, scaling), offset);
                __m512 p = _mm512_maskz_mov_ps(mask, exp2_512(_mm512_mul_ps(below, _mm512_set1_ps(LOG2E))));
                d[i] = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, s->d_scores + at), mean));
                if (ratio > 0) {
                    __m512 capped = _mm512_mul_ps(score, capping);
                    d[i] = _mm512_mul_ps(d[i], _mm512_fnmadd_ps(capped, capped, one));
                }
                _mm256_storeu_si256((__m256i *)(void *)(s->p_rows + at), (__m256i)_mm512_cvtneps_pbh(p));
                _mm256_storeu_si256((__m256i *)(void *)(s->ds_rows + at), (__m256i)_mm512_cvtneps_pbh(d[i]));
            }
            _mm512_storeu_si512(s->pairs + key / 2 * QUERIES + VECTOR * v, interleaved(d[0], d[1]));
        }
}

/* Of each query: lse and rowsum(dO O). */
TARGET_ATTENTION static void row_statistics(const Attention *t, const Block *b, int64_t start, int64_t head, float *lse,
                                            float *means)
{
    memset(lse, 0, QUERIES * 4);
    memset(means, 0, QUERIES * 4);
    for (int64_t i = 0; i < b->queries; i++) {
        const uint16_t *grad = row_of(&t->grad, start + b->query + i, head);
        const uint16_t *out = row_of(&t->out, start + b->query + i, head);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t column = 0; column < t->width; column += 2 * VECTOR) {
            __mmask32 inside = t->width - column >= 2 * VECTOR ? 0xFFFFFFFFu : 0xFFFF;
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(inside, grad + column),
                                   (__m512bh)_mm512_maskz_loadu_epi16(inside, out + column));
        }
        means[i] = _mm512_reduce_add_ps(sum);
        lse[i] = t->lse[head * t->tokens + start + b->query + i];
    }
}

TARGET_ATTENTION static void backward_block(const Attention *t, const Scratch *s, Block b, int64_t start, int64_t head)
{
    int64_t width = t->width, end = b.query + b.queries, oldest = max_i64(0, b.query - t->window + 1) / ROWS * ROWS;
    int64_t rows = (b.queries + VECTOR - 1) / VECTOR * VECTOR;
    float lse[QUERIES], means[QUERIES], factors[QUERIES];
    const uint16_t *q = row_of(&t->q, start + b.query, head), *grad = row_of(&t->grad, start + b.query, head);
    for (int i = 0; i < QUERIES; i++)
        factors[i] = t->scale;
    row_statistics(t, &b, start, head, lse, means);
    memset(s->turned, 0, (size_t)(width * QUERIES) * 4);
    pack_turned(q, t->q.token, b.queries, width, s->q_turned);
    pack_turned(grad, t->grad.token, b.queries, width, s->grad_turned);
    pack_pairs(q, t->q.token, 0, b.queries, rows, width, s->q_pairs);
    pack_pairs(grad, t->grad.token, 0, b.queries, rows, width, s->grad_pairs);
    for (b.key = oldest; b.key < end; b.key += KEYS) {
        b.keys = padded_rows(min_i64(KEYS, end - b.key));
        score_block(&b, s->k_rows, s->q_turned, width, s->scores);
        score_block(&b, s->v_rows, s->grad_turned, width, s->d_scores);
        if (t->softcap > 0)
            apply_softcap(&b, t->scale / t->softcap, s->scores);
        differentiate_scores(&b, t, s, lse, means);
        scatter_gradients(&b, s->p_rows, s->grad_pairs, width, s->dv);
        scatter_gradients(&b, s->ds_rows, s->q_pairs, width, s->dk);
        gather_values(&b, s->k_pairs, s->pairs, width, s->turned);
    }
    write_turned(s->turned, factors, b.queries, width, writable(&t->dq, start + b.query, head), t->dq.token);
}

/* ---- tasks ---- */

EXPORT int nybble_attend_available(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

/* Bytes that each thread needs; their start a multiple of 64. */
EXPORT int64_t nybble_attend_scratch(int64_t width, int64_t longest)
{
    Scratch s;
    return lay_out(&s, 0, width, longest);
}

EXPORT void nybble_attend(Attention *t, void *scratch)
{
    Scratch s;
    lay_out(&s, scratch, t->width, t->longest);
    int64_t task, packed = -1;
    while ((task = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->documents * t->heads) {
        int64_t document = task / t->heads, head = task % t->heads, shared = head / (t->heads / t->kv_heads);
        int64_t first = t->firsts[document], last = t->firsts[document + 1];
        for (const Segment *g = t->segments + first; g < t->segments + last; g++) {
            int64_t end = g->offset + g->length, rows = padded_rows(end);
            if (packed != document * t->kv_heads + shared || last > first + 1) {
                pack_rows(row_of(&t->k, g->start, shared), t->k.token, g->length, rows - g->offset, t->width,
                          s.k_rows + g->offset * t->width);
                pack_pairs(row_of(&t->v, g->start, shared), t->v.token, g->offset, end, rows, t->width, s.v_pairs);
            }
            for (int64_t query = g->offset; query < end; query += QUERIES) {
                Block b = {query, min_i64(QUERIES, end - query), 0, 0, t->window};
                forward_block(t, &s, b, g->start - g->offset, head);
            }
        }
        packed = document * t->kv_heads + shared;
    }
}

/* The gradients of a segment's keys and values, which nothing more adds to. */
TARGET_ATTENTION static void write_segment(const Attention *t, const Scratch *s, const Segment *g, int64_t shared)
{
    int64_t at = g->offset * t->width;
    write_rows(s->dk + at, t->scale, g->length, t->width, writable(&t->dk, g->start, shared), t->dk.token);
    write_rows(s->dv + at, 1.0f, g->length, t->width, writable(&t->dv, g->start, shared), t->dv.token);
}

EXPORT void nybble_attend_backward(Attention *t, void *scratch)
{
    Scratch s;
    lay_out(&s, scratch, t->width, t->longest);
    int64_t task, group = t->heads / t->kv_heads;
    while ((task = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->documents * t->kv_heads) {
        int64_t document = task / t->kv_heads, shared = task % t->kv_heads;
        int64_t held = -1; /* the last segment of the path in scratch memory */
        for (int64_t i = t->firsts[document]; i < t->firsts[document + 1]; held = i++) {
            const Segment *g = t->segments + i;
            int64_t end = g->offset + g->length, rows = padded_rows(end), at = g->offset * t->width;
            const uint16_t *k = row_of(&t->k, g->start, shared), *v = row_of(&t->v, g->start, shared);
            for (; held != g->parent; held = t->segments[held].parent)
                write_segment(t, &s, t->segments + held, shared);
            pack_rows(k, t->k.token, g->length, rows - g->offset, t->width, s.k_rows + at);
            pack_rows(v, t->v.token, g->length, rows - g->offset, t->width, s.v_rows + at);
            pack_pairs(k, t->k.token, g->offset, end, rows, t->width, s.k_pairs);
            memset(s.dk + at, 0, (size_t)((rows - g->offset) * t->width) * 4);
            memset(s.dv + at, 0, (size_t)((rows - g->offset) * t->width) * 4);
            for (int64_t head = shared * group; head < (shared + 1) * group; head++)
                for (int64_t query = g->offset; query < end; query += QUERIES) {
                    Block b = {query, min_i64(QUERIES, end - query), 0, 0, t->window};
                    backward_block(t, &s, b, g->start - g->offset, head);
                }
        }
        for (; held >= 0; held = t->segments[held].parent)
            write_segment(t, &s, t->segments + held, shared);
    }
}

#endif
