/* The loops of native_few.h for one type of x; included once for each, with these defined (and undefined at the end):
TARGET, the functions' attribute; FN, their names; NUMBER, the type of x; TABLE, what 16 values lie in, OPEN,
how it is read, and UNIT, what they are to be multiplied by; LOOK_UP, the values of VALUES codes, the next of which
SHIFTED brings up; ADD, their product with as many numbers of x. */

TARGET ALWAYS_INLINE void FN(group)(__m512i codes, TABLE table, __m512 scale, const NUMBER *x, int64_t stride, int rows,
                                    __m512 *totals)
{
    __m512 lanes[MAX_ROWS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        lanes[row] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 128; i += VALUES, codes = SHIFTED(codes)) {
        TABLE values = LOOK_UP(codes, table);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
            lanes[row] = ADD(lanes[row], values, x + row * stride + i);
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
        totals[row] = _mm512_fmadd_ps(lanes[row], scale, totals[row]);
}

TARGET ALWAYS_INLINE void FN(features)(const Piece *piece, const NUMBER *x, int64_t stride, int rows, float *sums,
                                       int per_group, int is_nested)
{
    enum { AHEAD = 4096 }; /* bytes; memory comes a quarter faster than by the processor's own prefetching */
    const Packed p = *piece->packed;
    TABLE table = OPEN(p.tables);
    __m512 totals[MAX_ROWS];
    int shift = __builtin_ctzll((uint64_t)p.block); /* a division would take as long as the rest */
    for (int64_t feature = 0; feature < piece->features; feature++, sums += rows) {
        int64_t start = (piece->first + feature) * piece->in_features, end = start + piece->in_features, at = start;
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
            totals[row] = _mm512_setzero_ps();
        for (; at + 128 <= end; at += 128) {
            __m512 scale = scales_avx512(&p, at >> shift, per_group, per_group, is_nested);
            _mm_prefetch((const char *)p.codes + at / 2 + AHEAD, _MM_HINT_T0);
            FN(group)(_mm512_loadu_si512(p.codes + at / 2), table, scale, x + at - start, stride, rows, totals);
        }
        if (at < end) {
            __m512 scale = scales_avx512(&p, at >> shift, (int)((end - at) >> shift), per_group, is_nested);
            __m512i rest = _mm512_maskz_loadu_epi8((__mmask64)-1 >> (64 - (end - at) / 2), p.codes + at / 2);
            FN(group)(rest, table, scale, x + at - start, stride, rows, totals);
        }
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
            sums[row] = _mm512_reduce_add_ps(totals[row]) * UNIT(p.tables);
    }
}

/* What is the same for a whole product is a constant in each copy: then sums stay in registers. */
#define ROWS(number)                                                                                                   \
    case number:                                                                                                       \
        FN(features)(piece, x, stride, number, sums, per_group, is_nested);                                            \
        break;
#define COPY(name, per_group_, is_nested_)                                                                             \
    TARGET static void FN(name)(const Piece *piece, const NUMBER *x, int64_t stride, int64_t rows, float *sums)        \
    {                                                                                                                  \
        const int per_group = per_group_, is_nested = is_nested_;                                                      \
        switch (rows) {                                                                                                \
            ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) default : ROWS(8)                                  \
        }                                                                                                              \
    }

COPY(wide_blocks, 1, 0)
COPY(nested_wide_blocks, 1, 1)
COPY(blocks_of_64, 2, 0)
COPY(nested_blocks_of_64, 2, 1)
COPY(blocks_of_32, 4, 0)
COPY(nested_blocks_of_32, 4, 1)

TARGET static void FN(multiply)(const Piece *piece, const NUMBER *x, int64_t stride, int64_t rows, float *sums)
{
    int is_nested = piece->packed->absmax == 0;
    if (piece->packed->block == 64)
        (is_nested ? FN(nested_blocks_of_64) : FN(blocks_of_64))(piece, x, stride, rows, sums);
    else if (piece->packed->block == 32)
        (is_nested ? FN(nested_blocks_of_32) : FN(blocks_of_32))(piece, x, stride, rows, sums);
    else
        (is_nested ? FN(nested_wide_blocks) : FN(wide_blocks))(piece, x, stride, rows, sums);
}

#undef ROWS
#undef COPY
#undef TARGET
#undef FN
#undef NUMBER
#undef TABLE
#undef OPEN
#undef UNIT
#undef VALUES
#undef SHIFTED
#undef LOOK_UP
#undef ADD
