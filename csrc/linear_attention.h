/* Linear attention, short convolutions and selective scans: what the library and its caller share. */

#pragma once

#include "common.h"

typedef struct {
    void *data;
    int64_t token; /* elements from a token to the next */
    int64_t head;  /* elements from a head to the next; within a head they follow each other */
} StridedTokens;

/* Consecutive tokens of one segment, at most CHUNK. */
typedef struct {
    int64_t first, length;
    int64_t before; /* the chunk whose state it continues, which has a smaller index, or -1 */
} Chunk;

enum { CHUNK = 64 };

typedef struct {
    StridedTokens q, k, v;       /* (tokens, key_heads, key_width) twice, (tokens, heads, width) */
    StridedTokens out;           /* result, like v: written by the forward */
    StridedTokens grad;          /* of the result, like v */
    StridedTokens dv;            /* like v */
    const float *g, *beta;       /* (tokens, heads) */
    float *dq, *dk;              /* (tokens, key_heads, slices, key_width), zeros: added to by the backward */
    float *dg, *dbeta;           /* (tokens, heads) */
    const Chunk *chunks;         /* of all segments, in order */
    int64_t n_chunks, heads, key_heads, key_width, width; /* widths are multiples of 16 */
    int64_t slices;              /* parts of the heads that share keys: each part is a task */
    int64_t dtype;               /* of q, k, v, out, grad and dv: FLOAT32 or BFLOAT16 */
    int64_t delta, normalize;
    float scale;
} LinearAttention;

typedef struct {
    const void *x;              /* (tokens, channels), a token's channels follow each other */
    const float *weight, *bias; /* (taps, channels), of the token itself first; (channels,) or null */
    void *out;                  /* (tokens, channels), contiguous: the result, or the gradient of x */
    const void *grad;           /* of the result, like x */
    float *d_weight, *d_bias;   /* like weight and bias, zeros: added to */
    const int64_t *earlier; /* (taps, tokens): of each token the one 0, 1, .. before it; `tokens` where there is none */
    int64_t tokens, channels;  /* channels: a multiple of 16 */
    int64_t taps, dtype, silu;
    int64_t stride, grad_stride; /* elements from a token to the next, of x and grad */
} Convolution;

/* Let these operators use this set of instructions. */
void linear_attention_use(int isa);

ASSERT_SIZE(StridedTokens, 24);
ASSERT_SIZE(Chunk, 24);
ASSERT_SIZE(LinearAttention, 280);
ASSERT_SIZE(Convolution, 120);
