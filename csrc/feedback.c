/* The loops of error feedback for one core: columns of a weight are rounded one after another, for some outputs at a time.

Every float32 operation and its order are those of `nybble.quant.feedback`, so that all bits are the same: nothing here
may be contracted into fused multiply-adds (-ffp-contract=off). Outputs do not depend on each other, so they are the
lanes of vectors that the compiler makes. Sets for wider vectors are not worth it: 128 columns of 576 outputs
take 1.3 ms without and 1.1 ms with AVX-512, beside 6 ms in torch. */

#include "ops4bit.h"

enum { OUTPUTS = 64 }; /* at a time: 128 columns of them lie in the first-level cache */

/* The nearest values of a column, with the order of the operations of `_Grid.nearest`. */
ALWAYS_INLINE void round_column(const float *restrict wanted, const float *restrict scales, const Tables *t,
                                int64_t count, float *restrict values)
{
    float scaled[OUTPUTS], lowest = t->ascending[0];
    for (int64_t o = 0; o < count; o++) {
        float size = scales[o] < 0 ? -scales[o] : scales[o];
        scaled[o] = wanted[o] * (1.0f / (size < TINY ? TINY : scales[o]));
        values[o] = lowest;
    }
    for (int k = 0; k < 15; k++) {
        float midpoint = t->midpoints[k], above = t->ascending[k + 1];
        for (int64_t o = 0; o < count; o++)
            values[o] = scaled[o] > midpoint ? above : values[o];
    }
    for (int64_t o = 0; o < count; o++)
        values[o] *= scales[o];
}

ALWAYS_INLINE void feed_back_tile(const Columns *c, float *left, float *chosen, float *errors, int64_t from,
                                  int64_t count)
{
    for (int64_t i = 0; i < c->n; i++) {
        const float *factors = c->factor + i * c->stride;
        int64_t at = i * c->outputs + from;
        float error[OUTPUTS], own = factors[i];
        round_column(left + at, c->scales + at, c->tables, count, chosen + at);
        for (int64_t o = 0; o < count; o++)
            error[o] = (left[at + o] - chosen[at + o]) / own;
        memcpy(errors + at, error, (size_t)count * 4);
        for (int64_t j = i + 1; j < c->n; j++) {
            float factor = factors[j], *restrict rest = left + j * c->outputs + from;
            for (int64_t o = 0; o < count; o++)
                rest[o] -= factor * error[o];
        }
    }
}

ALWAYS_INLINE void descend_tile(const Columns *c, float *chosen, float *pull, float *moved, int64_t from, int64_t count)
{
    for (int64_t i = 0; i < c->n; i++) {
        int64_t at = i * c->outputs + from;
        float wanted[OUTPUTS], move[OUTPUTS], values[OUTPUTS], own = c->factor[i * c->stride + i];
        for (int64_t o = 0; o < count; o++)
            wanted[o] = chosen[at + o] + pull[at + o] / own;
        round_column(wanted, c->scales + at, c->tables, count, values);
        for (int64_t o = 0; o < count; o++)
            move[o] = chosen[at + o] - values[o];
        memcpy(moved + at, move, (size_t)count * 4);
        memcpy(chosen + at, values, (size_t)count * 4);
        for (int64_t j = 0; j < c->n; j++) {
            float factor = c->factor[j * c->stride + i], *restrict row = pull + j * c->outputs + from;
            for (int64_t o = 0; o < count; o++)
                row[o] += factor * move[o];
        }
    }
}

/* left, chosen and errors: (n, outputs). Outputs [first, last). */
EXPORT void nybble_feed_back(const Columns *c, float *left, float *chosen, float *errors, int64_t first, int64_t last)
{
    for (; last - first >= OUTPUTS; first += OUTPUTS) /* a constant number, which the compiler unrolls */
        feed_back_tile(c, left, chosen, errors, first, OUTPUTS);
    feed_back_tile(c, left, chosen, errors, first, last - first);
}

/* chosen, pull and moved: (n, outputs). Outputs [first, last). */
EXPORT void nybble_descend(const Columns *c, float *chosen, float *pull, float *moved, int64_t first, int64_t last)
{
    for (; last - first >= OUTPUTS; first += OUTPUTS)
        descend_tile(c, chosen, pull, moved, first, OUTPUTS);
    descend_tile(c, chosen, pull, moved, first, last - first);
}
