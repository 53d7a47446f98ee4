/* Causal attention in bfloat16: what the library and its caller share. */

#pragma once

#include "common.h"

typedef struct {
    const uint16_t *data; /* bfloat16; the elements of one head's row follow each other */
    int64_t token;        /* elements from a token to the next */
    int64_t head;         /* elements from a head to the next */
} StridedHeads;

/* Tokens of a document that follow one another. They see those of the segment's ancestors, and their own up to
themselves. A document of one segment is a row; several are a tree, in pre-order. */
typedef struct {
    int64_t start, length; /* its first token, and how many */
    int64_t offset;        /* tokens of its ancestors */
    int64_t parent;        /* index of a segment, or -1 */
} Segment;

typedef struct {
    StridedHeads q, k, v;            /* (tokens, heads, width), (tokens, kv_heads, width) twice */
    StridedHeads out;                /* result, like q: written by the forward, read by the backward */
    StridedHeads grad;               /* of the result, like q */
    StridedHeads dq, dk, dv;         /* results of the backward, like q, k and v */
    float *lse;                      /* (heads, tokens) natural logarithm of the sum of each softmax */
    const Segment *segments;         /* of all documents, the longest document first */
    const int64_t *firsts;           /* of each document, its first segment; then the number of segments */
    int64_t documents, tokens, heads, kv_heads;
    int64_t longest; /* tokens of the longest path from a root to the end of a segment */
    int64_t width;  /* a multiple of 16, at most 256 */
    int64_t window; /* tokens that a token sees, itself among them */
    float scale;    /* more than 0 */
    float softcap;  /* 0: none */
    int64_t next;   /* the task that nobody has taken yet; starts at 0 */
} Attention;

ASSERT_SIZE(StridedHeads, 24);
ASSERT_SIZE(Segment, 32);
ASSERT_SIZE(Attention, 288);
