/* Linear attention over documents, forward and backward, in float32; `linear_attention/torch.py` has the formulas.

A task is some of the heads that share keys. A head's chunks are computed one after the other, each by products of at
most CHUNK rows that stay in the second-level cache; the states after all chunks of a head are kept in scratch memory,
since branches of a tree and the backward come back to them. Sums have one order, whatever the number of threads. The
loops are written once, in linear_attention_loops.h, and included here once for each set of instructions. */

#include "linear_attention.h"

#include <math.h>

/* Element (i, j) is data[i * row + j * column]. */
typedef struct {
    const float *data;
    int64_t row, column;
} Matrix;

/* Scratch memory of a thread. */
typedef struct {
    float *states, *d_states;                                 /* of each chunk, (key width, width) */
    float *q, *k, *dq, *dk_late, *dk_early, *narrow;          /* (CHUNK, key width) */
    float *k_turned;                                          /* (key width, CHUNK) */
    float *state_turned;                                      /* (width, key width) */
    float *v, *r, *known, *grad, *dr, *wide;                  /* (CHUNK, width) */
    float *r_turned;                                          /* (width, CHUNK) */
    float *gaps, *reads, *pairs, *solved, *y;                 /* (CHUNK, CHUNK) */
    float *c, *beta, *from_start, *to_end, *d_beta, *q_rlengths, *k_rlengths; /* (CHUNK,) */
} Work;

typedef struct {
    void (*forward)(const LinearAttention *t, const Work *w, int64_t head);
    void (*backward)(const LinearAttention *t, const Work *w, int64_t head, int64_t slice);
    void (*convolve)(const Convolution *t, int64_t first, int64_t last);
    void (*convolve_backward)(const Convolution *t, float *sums, int64_t first, int64_t last);
} LinearAttentionLoops;

/* ---- plain C ---- */

static inline f4 choose4(i4 first, f4 a, f4 b)
{
    return (f4)(((i4)a & first) | ((i4)b & ~first));
}

#define TARGET
#define FN(name) name##_plain_chunks
#define LANES32 4
#define ROWS 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define MAX(a, b) choose4((a) > (b), a, b)
#define MIN(a, b) choose4((a) < (b), a, b)
#include "linear_attention_loops.h"

#if defined(__x86_64__)

#define TARGET TARGET_AVX2
#define FN(name) name##_avx2_chunks
#define LANES32 8
#define ROWS 4
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#include "linear_attention_loops.h"

#define TARGET TARGET_AVX512
#define FN(name) name##_avx512_chunks
#define LANES32 16
#define ROWS 8
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#define TIMES_POWER(x, n) _mm512_scalef_ps(x, n)
#include "linear_attention_loops.h"

#endif

/* ---- which set runs ---- */

static const LinearAttentionLoops *active = &set_plain_chunks;

void linear_attention_use(int isa)
{
    active = &set_plain_chunks;
#if defined(__x86_64__)
    active = isa >= ISA_AVX512 ? &set_avx512_chunks : isa == ISA_AVX2 ? &set_avx2_chunks : &set_plain_chunks;
#else
    (void)isa;
#endif
}

/* ---- linear attention ---- */

/* Hand out scratch memory from `from` on; with `from` null only count it. Returns how many numbers it has. */
static int64_t hand_out(const LinearAttention *t, Work *w, float *from, int has_grad)
{
    const int64_t dk = t->key_width, dv = t->width, size = dk * dv;
    const struct {
        float **part;
        int64_t numbers;
    } parts[] = {
        {&w->states, t->n_chunks * size},
        {&w->d_states, has_grad ? (t->n_chunks + 1) * size : 0},
        {&w->q, CHUNK * dk},
        {&w->k, CHUNK * dk},
        {&w->dq, CHUNK * dk},
        {&w->dk_late, CHUNK * dk},
        {&w->dk_early, CHUNK * dk},
        {&w->narrow, CHUNK * dk},
        {&w->k_turned, CHUNK * dk},
        {&w->state_turned, size},
        {&w->v, CHUNK * dv},
        {&w->r, CHUNK * dv},
        {&w->known, CHUNK * dv},
        {&w->grad, CHUNK * dv},
        {&w->dr, CHUNK * dv},
        {&w->wide, CHUNK * dv},
        {&w->r_turned, CHUNK * dv},
        {&w->gaps, CHUNK * CHUNK},
        {&w->reads, CHUNK * CHUNK},
        {&w->pairs, CHUNK * CHUNK},
        {&w->solved, CHUNK * CHUNK},
        {&w->y, CHUNK * CHUNK},
        {&w->c, CHUNK},
        {&w->beta, CHUNK},
        {&w->from_start, CHUNK},
        {&w->to_end, CHUNK},
        {&w->d_beta, CHUNK},
        {&w->q_rlengths, CHUNK},
        {&w->k_rlengths, CHUNK},
    };
    int64_t total = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].part = from ? from + total : 0;
        total += parts[i].numbers;
    }
    return total;
}

/* How many float32 numbers of scratch memory a thread needs. */
EXPORT int64_t nybble_linear_attention_scratch(const LinearAttention *t, int64_t has_grad)
{
    Work w;
    return hand_out(t, &w, 0, has_grad != 0);
}

/* Compute the tasks [first, last) of key_heads * slices: the forward, or the backward where `t->grad` is there. */
EXPORT void nybble_linear_attention(const LinearAttention *t, float *scratch, int64_t first, int64_t last)
{
    Work w;
    const int has_grad = t->grad.data != 0;
    hand_out(t, &w, scratch, has_grad);
    for (int64_t task = first; task < last; task++) {
        const int64_t n = t->heads / t->key_heads, slice = task % t->slices, start = task / t->slices * n;
        for (int64_t head = start + n * slice / t->slices; head < start + n * (slice + 1) / t->slices; head++) {
            if (has_grad)
                active->backward(t, &w, head, slice);
            else
                active->forward(t, &w, head);
        }
    }
}

/* ---- short convolution ---- */

/* The tokens [first, last). */
EXPORT void nybble_short_convolution(const Convolution *t, int64_t first, int64_t last)
{
    active->convolve(t, first, last);
}

/* The groups of 16 channels [first, last); `scratch` has 16 numbers for each token. */
EXPORT void nybble_short_convolution_backward(const Convolution *t, float *scratch, int64_t first, int64_t last)
{
    active->convolve_backward(t, scratch, first, last);
}
