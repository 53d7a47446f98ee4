/* Blocks of GGUF: scales and codes by weighted least squares; `quant/kquants.py` defines what is computed. */

#pragma once

#include "common.h"

enum { KQUANT_LANES = 16, KQUANT_GROUPS = 16 };

typedef struct {
    const float *x;       /* blocks of `groups` groups of `vectors` vectors of 16 weights */
    const float *w;       /* importances of the columns of one row, `row_blocks` blocks */
    const float *factors; /* of the scales that are tried */
    uint8_t *codes;       /* counted from 0 */
    int8_t *scales;       /* per group; of formats without them zeros */
    int8_t *mins;
    float *d; /* per block, numbers that float16 has */
    float *e;
    int64_t row_blocks;
    int64_t groups;
    int64_t vectors;
    int64_t n_factors;
    int64_t affine;
    int64_t has_scales;
    float least_code, largest_code;
    float least_scale, largest_scale;
} KQuant;

ASSERT_SIZE(KQuant, 128);

void kquants_use(int isa);
