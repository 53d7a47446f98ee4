/* The 4-bit operators: structures that callers fill in, and what a set of inner loops offers. */

#pragma once

#include "common.h"

#define TILE 4
#define LANES 16
#define TINY 1e-38f

typedef struct {
    float lut[16];        /* value of each code */
    float ascending[16];  /* the same in ascending order */
    float tree[16];       /* the 15 midpoints as a search tree; [0] is not used */
    float midpoints[16];  /* ascending; [15] is not used */
    int32_t order[16];    /* codes in ascending order of their values */
    uint16_t rounded[32]; /* values in bfloat16, times 1 / unit, twice */
    float unit;
} Tables;

typedef struct {
    const void *data; /* n weights */
    int64_t n;
    int64_t block;
    int64_t dtype;
    const Tables *tables;
} Source;

typedef struct {
    const uint8_t *codes; /* two to a byte, the first in the high nibble */
    const float *absmax;  /* a scale per block, or null: then the four below */
    const uint8_t *absmax8;
    const float *nested; /* a scale per 256 blocks */
    const float *table8; /* 256 values */
    float offset;
    int64_t n;
    int64_t block;
    const Tables *tables;
} Packed;

typedef struct {
    const float *wanted; /* a scale per block */
    const float *nested;
    const float *table8;    /* 256 values, ascending */
    const float *midpoints; /* 255 */
    float offset;
    int64_t neighbours; /* codes tried on either side of the nearest */
} Nested;

typedef struct {
    const Packed *packed; /* W in 4 bits, or null: then */
    const void *dense;    /* W as numbers, of the type of x */
    const void *x;        /* (rows, in_features) */
    void *out;            /* (rows, out_features), of the same type */
    int64_t dtype;
    int64_t rows;
    int64_t in_features;
    int64_t out_features;
    const float *a; /* (rank, in_features), or null: s B A is added to W */
    const float *b; /* (out_features, rank) */
    int64_t rank;
    float scaling;
    float *wide;    /* (rows, stride): x in float32, in the order that the loops want; set here */
    int64_t stride; /* in_features rounded up to a multiple of 128; set here */
    float *inner;   /* (rows, rank): s x A^T; set here */
} Product;

/* Columns of a weight, whose values for all outputs lie side by side. */
typedef struct {
    const float *scales; /* (n, outputs) */
    const float *factor; /* (n, n) of a matrix with rows of `stride` numbers */
    int64_t stride;
    int64_t n;
    int64_t outputs;
    const Tables *tables;
} Columns;

ASSERT_SIZE(Tables, 388);
ASSERT_SIZE(Source, 40);
ASSERT_SIZE(Packed, 72);
ASSERT_SIZE(Nested, 48);
ASSERT_SIZE(Product, 120);
ASSERT_SIZE(Columns, 48);

/* Some rows of W, each of whole blocks. */
typedef struct {
    const Packed *packed;
    int64_t first;
    int64_t features;
    int64_t in_features;
} Piece;

/* One set of inner loops. w: whole blocks in float32, filled up with zeros; groups: of 16 weights. */
typedef struct {
    void (*widen)(const void *source, int64_t dtype, int64_t n, float *out);
    void (*errors)(const float *w, int64_t groups, const float *scales, int64_t count, const Tables *t, float *errors);
    void (*nearest)(const float *w, int64_t groups, float inverse, const Tables *t, uint8_t *codes);
    void (*decode)(const uint8_t *codes, const float *scales, int64_t blocks, int64_t block, const float *lut,
                   int64_t dtype, void *out);
    float (*dot)(const float *a, const float *b, int64_t n);
    void (*dense)(const void *w, int64_t dtype, int64_t n, const float *x, int64_t stride, int64_t rows, float *sums);
    int64_t lanes; /* of `multiply`; 0: there is none */
    /* sums[feature][row] = row of x times feature */
    void (*multiply)(const Piece *piece, const float *x, int64_t stride, int64_t rows, float *sums);
    /* the same for x in bfloat16, with values in bfloat16; or null */
    void (*multiply16)(const Piece *piece, const uint16_t *x, int64_t stride, int64_t rows, float *sums);
    void (*tile16)(const uint16_t *const *x, const uint16_t *const *w, int64_t n, float (*sums)[TILE]);
} Ops4bitLoops;
