/* The loops of the 4-bit format for one core: decode, x W^T for a few rows, and the three steps of the encoder.

Every float32 operation and its order are those of `nybble.quant` (decode, search), so that all bits are the same; only
the sums of `nybble_multiply` are free. Nothing here may be contracted into fused multiply-adds: -ffp-contract=off.

Decoding is table look-up: a block has 16 different values, so these are multiplied and rounded once per block and then
moved by code. Encoding finds the nearest value by a search tree over the 15 midpoints, node k's children 2k and 2k + 1:
four steps lead from node 1 to node 16 + rank.

Sets of inner loops, chosen at run time: AVX-512 with and without bfloat16 (ops4bit_gemv.h), AVX2 (ops4bit_x86.h), and
plain C (ops4bit_plain.h). The functions here walk over blocks [first, last) and call the chosen set. */

#include <stdlib.h>

#include "ops4bit_plain.h"
#include "ops4bit_gemv.h"

static const Ops4bitLoops *active = &PLAIN;

void ops4bit_use(int isa)
{
    active = &PLAIN;
#if defined(__x86_64__)
    active = isa >= ISA_AVX512 ? &WITH_AVX512 : isa == ISA_AVX2 ? &WITH_AVX2 : &PLAIN;
#if defined(HAS_BF16)
    active = isa == ISA_BF16 ? &WITH_BF16 : active;
#endif
#else
    (void)isa;
#endif
}

/* ---- several threads ---- */

/* GOMP_parallel of the OpenMP library that torch has loaded: its threads are awake already. */
typedef void (*ThreadTeam)(void (*)(void *), void *, unsigned, unsigned);
typedef void (*Loop)(const void *arguments, int64_t first, int64_t last);

static ThreadTeam team;

EXPORT void nybble_set_team(ThreadTeam given)
{
    team = given;
}

typedef struct {
    Loop loop;
    const void *arguments;
    int64_t n;
    int64_t step;
    int64_t next;
} Work;

static void run_steps(void *given)
{
    Work *work = given;
    int64_t first;
    while ((first = __atomic_fetch_add(&work->next, work->step, __ATOMIC_RELAXED)) < work->n)
        work->loop(work->arguments, first, work->n - first < work->step ? work->n : first + work->step);
}

/* loop over all of [0, n), `step` at a time. */
static void run_on_threads(Loop loop, const void *arguments, int64_t n, int64_t step, int64_t threads)
{
    Work work = {loop, arguments, n, step, 0};
    if (team && threads > 1)
        team(run_steps, &work, (unsigned)threads, 0);
    else
        loop(arguments, 0, n);
}

/* ---- decoding ---- */

/* `count` blocks from `first` on; the last block of the weight may be short: out never gets more than it has. */
static void decode_run(const Packed *p, int64_t first, int64_t count, int64_t dtype, void *out)
{
    enum { RUN = 256 };
    int64_t width = bytes_of(dtype), last = first + count, full = p->n / p->block;
    char *to = out;
    for (int64_t b = first; b < last; b += RUN) {
        float scales[RUN];
        int64_t n = last - b < RUN ? last - b : RUN, whole = full - b < n ? full - b : n;
        const uint8_t *codes = p->codes + b * p->block / 2;
        for (int64_t i = 0; i < n; i++)
            scales[i] = scale_of(p, b + i);
        active->decode(codes, scales, whole, p->block, p->tables->lut, dtype, to);
        to += n * p->block * width;
        if (whole < n) {
            uint8_t padded[MAX_BLOCK / 2] = {0};
            float values[MAX_BLOCK];
            int64_t rest = p->n - full * p->block;
            memcpy(padded, p->codes + full * p->block / 2, (size_t)(rest + 1) / 2);
            active->decode(padded, scales + whole, 1, p->block, p->tables->lut, dtype, values);
            memcpy(to - p->block * width, values, (size_t)(rest * width));
        }
    }
}

/* Blocks [first, last) into out, the result's start. */
EXPORT void nybble_decode(const Packed *p, int64_t dtype, void *out, int64_t first, int64_t last)
{
    decode_run(p, first, last - first, dtype, (char *)out + first * p->block * bytes_of(dtype));
}

/* ---- a few rows of x ---- */

/* Whether rows of W begin with a block, so that the set's own loops can multiply codes. */
static int starts_with_blocks(const Product *product)
{
    return product->packed && active->lanes && product->in_features % product->packed->block == 0;
}

/* Whether codes are multiplied in bfloat16. */
static int multiplies_bf16(const Product *product)
{
    return starts_with_blocks(product) && product->dtype == BFLOAT16 && active->multiply16;
}

/* x as the loops want it: the next of 8 codes that lie in a lane comes up with each shift. */
static void widen_inputs(const Product *product)
{
    int64_t k = product->in_features, group = 8 * active->lanes, width = bytes_of(product->dtype);
    for (int64_t row = 0; row < product->rows; row++) {
        const char *x = (const char *)product->x + row * k * width;
        float *wide = product->wide + row * product->stride;
        if (!starts_with_blocks(product)) {
            active->widen(x, product->dtype, k, wide);
            continue;
        }
        for (int64_t from = 0; from < k; from += group, wide += group) {
            float natural[8 * LANES] = {0};
            int64_t n = k - from < group ? k - from : group;
            active->widen(x + from * width, product->dtype, n, natural);
            for (int64_t lane = 0; lane < active->lanes; lane++)
                for (int64_t j = 0; j < 8; j++) /* the first code of a byte is in its high half */
                    wide[j * active->lanes + lane] = natural[8 * lane + (j ^ 1)];
        }
    }
}

/* The same in bfloat16, whose registers have two lanes where those of float32 have one, with 4 codes each. */
static void reorder_inputs_bf16(const Product *product)
{
    enum { GROUP = 128 };
    int64_t k = product->in_features;
    for (int64_t row = 0; row < product->rows; row++) {
        const uint16_t *x = (const uint16_t *)product->x + row * k;
        uint16_t *ordered = (uint16_t *)product->wide + row * product->stride;
        for (int64_t from = 0; from < k; from += GROUP, ordered += GROUP) {
            uint16_t natural[GROUP] = {0};
            memcpy(natural, x + from, (size_t)(k - from < GROUP ? k - from : GROUP) * 2);
            for (int64_t lane = 0; lane < GROUP / 4; lane++)
                for (int64_t j = 0; j < 4; j++)
                    ordered[j * GROUP / 4 + lane] = natural[4 * lane + (j ^ 1)];
        }
    }
}

enum { STEP = 64 }; /* features that a thread takes at a time, about 5 us: all are done at about the same time */

/* What the base gives a feature, and the adapter to it. */
static void write_feature(const Product *product, int64_t feature, float *sums)
{
    if (product->a) {
        float added[MAX_ROWS];
        active->dense(product->b + feature * product->rank, FLOAT32, product->rank, product->inner, product->rank,
                      product->rows, added);
        for (int64_t row = 0; row < product->rows; row++)
            sums[row] += added[row];
    }
    for (int64_t row = 0; row < product->rows; row++) {
        int64_t place = row * product->out_features + feature;
        if (product->dtype == FLOAT32)
            ((float *)product->out)[place] = sums[row];
        else
            ((uint16_t *)product->out)[place] =
                product->dtype == FLOAT16 ? half_of_float(sums[row]) : bfloat_of_float(sums[row]);
    }
}

static void multiply_codes(const void *given, int64_t first, int64_t last)
{
    const Product *product = given;
    float sums[STEP * MAX_ROWS];
    for (int64_t count; first < last; first += count) {
        count = last - first < STEP ? last - first : STEP;
        Piece piece = {product->packed, first, count, product->in_features};
        if (multiplies_bf16(product))
            active->multiply16(&piece, (const uint16_t *)product->wide, product->stride, product->rows, sums);
        else
            active->multiply(&piece, product->wide, product->stride, product->rows, sums);
        for (int64_t i = 0; i < count; i++)
            write_feature(product, first + i, sums + i * product->rows);
    }
}

/* For more rows, in bfloat16: TILE features are decoded, some thousand columns at a time, and meet all rows while they
lie in the first-level cache. Rounded as `nybble_decode` rounds. */
static void multiply_tiles(const void *given, int64_t first, int64_t last)
{
    enum { COLUMNS = 2048 };
    const Product *product = given;
    const Packed *p = product->packed;
    uint16_t decoded[TILE][MAX_BLOCK + 32]; /* side by side they would fall on the same lines of the cache */
    int64_t k = product->in_features, rows = product->rows, width = p->block > COLUMNS ? p->block : COLUMNS;
    for (int64_t feature = first; feature < last; feature += TILE) {
        float sums[MANY_ROWS][TILE] = {{0}};
        int64_t count = last - feature < TILE ? last - feature : TILE;
        for (int64_t from = 0; from < k; from += width) {
            int64_t n = k - from < width ? k - from : width;
            const uint16_t *w[TILE], *x[TILE];
            for (int64_t i = 0; i < TILE; i++) {
                w[i] = decoded[i < count ? i : count - 1];
                if (i < count)
                    decode_run(p, ((feature + i) * k + from) / p->block, n / p->block, BFLOAT16, decoded[i]);
            }
            for (int64_t row = 0; row < rows; row += TILE) { /* sums of rows that are not there fall behind the last */
                for (int64_t i = 0; i < TILE; i++)
                    x[i] = (const uint16_t *)product->x + (row + i < rows ? row + i : rows - 1) * k + from;
                active->tile16(x, w, n, sums + row);
            }
        }
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < count; i++)
                ((uint16_t *)product->out)[row * product->out_features + feature + i] = bfloat_of_float(sums[row][i]);
    }
}

/* The same by way of decoded blocks, for any shape. */
static void multiply_decoded(const void *given, int64_t first, int64_t last)
{
    const Product *product = given;
    const Packed *p = product->packed;
    float values[MAX_BLOCK];
    for (int64_t feature = first; feature < last; feature++) {
        float sums[MAX_ROWS] = {0};
        const float *x = product->wide;
        int64_t from = feature * product->in_features, to = from + product->in_features;
        for (int64_t end; from < to; x += end - from, from = end) {
            int64_t block = from / p->block, count = (to - 1) / p->block + 1 - block;
            count = count < MAX_BLOCK / p->block ? count : MAX_BLOCK / p->block;
            end = (block + count) * p->block < to ? (block + count) * p->block : to;
            decode_run(p, block, count, FLOAT32, values);
            for (int64_t row = 0; row < product->rows; row++)
                sums[row] += active->dot(values + from - block * p->block, x + row * product->stride, end - from);
        }
        write_feature(product, feature, sums);
    }
}

static void multiply_dense(const void *given, int64_t first, int64_t last)
{
    const Product *product = given;
    int64_t row_bytes = product->in_features * bytes_of(product->dtype);
    for (int64_t feature = first; feature < last; feature++) {
        float sums[MAX_ROWS];
        const char *weights = (const char *)product->dense + feature * row_bytes;
        active->dense(weights, product->dtype, product->in_features, product->wide, product->stride, product->rows,
                      sums);
        write_feature(product, feature, sums);
    }
}

/* s x A^T, with x in the room for it as it stands. */
static void project_low_rank(const Product *product)
{
    int64_t width = bytes_of(product->dtype);
    for (int64_t row = 0; row < product->rows; row++) {
        active->widen((const char *)product->x + row * product->in_features * width, product->dtype,
                      product->in_features, product->wide);
        for (int64_t i = 0; i < product->rank; i++) {
            float *sum = product->inner + row * product->rank + i;
            active->dense(product->a + i * product->in_features, FLOAT32, product->in_features, product->wide, 0, 1,
                          sum);
            *sum *= product->scaling;
        }
    }
}

/* x (W + s B A)^T on `threads` threads; a feature is the work of one of them, so that their number changes no bit.
Returns 0, or -1 where there is no memory. */
EXPORT int nybble_multiply(Product *product, int64_t threads)
{
    if (multiplies_bf16(product) && product->rows > MAX_ROWS) {
        run_on_threads(multiply_tiles, product, product->out_features, STEP, threads);
        return 0;
    }
    /* Threads keep a little room from product to product, since one token asks for it hundreds of times. */
    enum { KEPT = 1 << 18 };
    static _Thread_local float *kept;
    Loop loop = product->packed == 0 ? multiply_dense : starts_with_blocks(product) ? multiply_codes : multiply_decoded;
    product->stride = (product->in_features + 127) / 128 * 128;
    int64_t needed = product->rows * (product->stride + product->rank);
    if (needed <= KEPT && !kept)
        kept = malloc(KEPT * sizeof *kept);
    float *room = needed <= KEPT ? kept : malloc((size_t)needed * sizeof *room);
    if (!room)
        return -1;
    product->wide = room;
    product->inner = room + product->rows * product->stride;
    if (product->a)
        project_low_rank(product);
    (multiplies_bf16(product) ? reorder_inputs_bf16 : widen_inputs)(product);
    run_on_threads(loop, product, product->out_features, STEP, threads);
    if (room != kept)
        free(room);
    return 0;
}

/* ---- encoding ---- */

/* A block in float32, filled up with zeros. */
static void read_block(const Source *s, int64_t b, float *w)
{
    int64_t first = b * s->block, n = s->n - first < s->block ? s->n - first : s->block;
    active->widen((const char *)s->data + first * bytes_of(s->dtype), s->dtype, n, w);
    memset(w + n, 0, (size_t)(s->block - n) * 4);
}

static float largest_magnitude(const float *w, int64_t n)
{
    int32_t largest = 0; /* bits of magnitudes order as the magnitudes do */
    for (int64_t i = 0; i < n; i++) {
        int32_t bits = (int32_t)(bits_of(w[i]) & 0x7FFFFFFFu);
        largest = bits > largest ? bits : largest;
    }
    return float_of((uint32_t)largest);
}

/* Which of the candidates has the least error; `otherwise` if none has one that is a number. Without branches: which
is best cannot be predicted. */
static int64_t best_of(const float *errors, int64_t count, int64_t otherwise)
{
    float least = __builtin_inff();
    int64_t best = otherwise;
    for (int64_t c = 0; c < count; c++) {
        int64_t better = -(int64_t)(errors[c] < least);
        least = errors[c] < least ? errors[c] : least;
        best = (c & better) | (best & ~better);
    }
    return best;
}

/* The best scale of blocks [first, last): absmax times one of `count` factors. */
EXPORT void nybble_search(const Source *s, const float *factors, int64_t count, float *scales, int64_t first,
                          int64_t last)
{
    float w[MAX_BLOCK], candidates[MAX_CANDIDATES + 1], errors[MAX_CANDIDATES];
    for (int64_t b = first; b < last; b++) {
        read_block(s, b, w);
        candidates[count] = largest_magnitude(w, s->block); /* kept where no error is a number */
        for (int64_t c = 0; c < count; c++)
            candidates[c] = candidates[count] * factors[c];
        active->errors(w, s->block / LANES, candidates, count, s->tables, errors);
        scales[b] = candidates[best_of(errors, count, count)];
    }
}

/* Place of the nearest of the 256 values: how many midpoints are below. */
static int64_t place8(float wanted, const float *midpoints)
{
    int64_t place = 0;
    for (int64_t step = 128; step; step /= 2)
        place += step & -(int64_t)(midpoints[place + step - 1] < wanted);
    return place;
}

/* The 8-bit code of the scale of blocks [first, last), near the wanted one. */
EXPORT void nybble_nested(const Source *s, const Nested *nested, uint8_t *codes, int64_t first, int64_t last)
{
    float w[MAX_BLOCK], candidates[MAX_CANDIDATES], errors[MAX_CANDIDATES];
    int64_t tried = 2 * nested->neighbours + 1;
    for (int64_t b = first; b < last; b++) {
        float step = nested->nested[b / 256], shifted = nested->wanted[b] - nested->offset;
        int64_t places[MAX_CANDIDATES + 1];
        int64_t nearest = place8(shifted * (1.0f / (step < TINY ? TINY : step)), nested->midpoints);
        read_block(s, b, w);
        for (int64_t c = 0; c < tried; c++) {
            int64_t place = nearest + c - nested->neighbours;
            places[c] = place < 0 ? 0 : place > 255 ? 255 : place;
            float product = nested->table8[places[c]] * step;
            candidates[c] = product + nested->offset;
        }
        active->errors(w, s->block / LANES, candidates, tried, s->tables, errors);
        places[tried] = nearest;
        codes[b] = (uint8_t)places[best_of(errors, tried, tried)];
    }
}

/* The nearest codes under given scales of blocks [first, last), two to a byte; out is the result's start. */
EXPORT void nybble_nearest(const Source *s, const float *scales, uint8_t *out, int64_t first, int64_t last)
{
    float w[MAX_BLOCK];
    uint8_t codes[MAX_BLOCK];
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * s->block, n = s->n - start < s->block ? s->n - start : s->block;
        read_block(s, b, w);
        active->nearest(w, s->block / LANES, inverse_of(scales[b]), s->tables, codes);
        for (int64_t i = 0; i < (n + 1) / 2; i++)
            out[start / 2 + i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
    }
}
