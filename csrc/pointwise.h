/* What happens between the products of a training step: structures that callers fill in. */

#pragma once

#include "common.h"

typedef struct {
    const void *x;      /* (n, width) */
    const void *weight; /* (width,) */
    const void *grad;   /* (n, width), of what the norm gave; backward only */
    void *out;          /* (n, width) */
    float *rstd;        /* (n,): 1 / root mean square */
    int64_t dtype;      /* of x, grad and out */
    int64_t weight_dtype;
    int64_t width;
    int64_t unit_offset; /* the weight is 1 + weight, and nothing is rounded before the end */
    float eps;
} Norm;

typedef struct {
    void *gate;
    void *up;
    void *grad; /* of the product; backward only */
    void *out;  /* forward only */
    int64_t dtype;
    int64_t is_gelu; /* its tanh form; otherwise SiLU */
} Gate;

typedef struct {
    const void *x;
    void *out;
    int64_t dtype;
    int64_t adds; /* to what is in out */
    uint32_t seed;
    uint32_t threshold; /* the smallest hash that is kept */
    float scale;        /* of what is kept */
} Dropout;

typedef struct {
    void *logits;          /* (n, width); become their gradients */
    const int64_t *labels; /* (n,), within width */
    float *below;          /* (n,): largest logit less the label's */
    float *total;          /* (n,): sum of exp(logit - largest); the loss is below + log total */
    float *scratch;        /* (2, width), or (1, width) without a cap; nobody else's while this runs */
    int64_t dtype;
    int64_t width;
    float softcap; /* 0: none */
} Loss;

typedef struct {
    const void *x;   /* (n, heads, width), each head's numbers side by side */
    const void *cos; /* (n, rotated) */
    const void *sin;
    void *out; /* (n, heads, width) without gaps */
    int64_t dtype;
    int64_t table_dtype; /* of cos and sin */
    int64_t heads;
    int64_t width;
    int64_t rotated;
    int64_t row_stride; /* of x, in elements */
    int64_t head_stride;
    float sign; /* -1 turns back */
} Rotation;

typedef struct {
    const void *q; /* (n, heads, width) without gaps */
    const void *k; /* (n, kv_heads, tokens, width), each token's numbers side by side */
    const void *v;
    void *out;     /* (n, heads, width) */
    float *scores; /* (n, heads, tokens): room */
    int64_t dtype;
    int64_t heads;
    int64_t kv_heads;
    int64_t tokens;
    int64_t width;
    int64_t k_strides[3]; /* of rows, heads and tokens, in elements */
    int64_t v_strides[3];
    float scale;
} DecodeAttention;

ASSERT_SIZE(Norm, 80);
ASSERT_SIZE(Gate, 48);
ASSERT_SIZE(Dropout, 48);
ASSERT_SIZE(Loss, 64);
ASSERT_SIZE(Rotation, 96);
ASSERT_SIZE(DecodeAttention, 136);
