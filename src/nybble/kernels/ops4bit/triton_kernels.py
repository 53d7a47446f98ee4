# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The Triton kernels, one source for HIP and CUDA: `gpu` launches them, `nybble.quant` says what each must give.

All arithmetic is IEEE float32, one rounding an operation, so that the bytes are those of every other backend: launches
and ahead-of-time compilation both switch the fusing of products with sums off (`OPTIONS`), and divisions are `div_rn`,
correctly rounded on both vendors. Sums whose order is part of the format are added two at a time.

A weight is moved in words of 8 codes, 32 bits. Triton reads the 4 words that lie together with one 16-byte load, deals
them out to neighbouring threads through local memory, and then every thread writes 8 decoded values side by side: 16
bytes a thread both ways, without gaps. The 16 values are looked up by `tl.gather`, which is a read of local memory
where 16 values lie in 16 banks; choosing by comparisons takes 34 vector operations a value, all of this 6 to 10.
Offsets are 64-bit for the start of a program's tile and 32-bit within it, so that weights may exceed 2^31 elements.
"""

from typing import NamedTuple

import triton
import triton.language as tl

OPTIONS = {"enable_fp_fusion": False}
SEARCHED = tl.constexpr(8)  # scales or codes tried at once, one register each
CHUNK = tl.constexpr(32)  # weights a thread decodes: 16 bytes; no block is smaller, so they share a scale
LANES = tl.constexpr(16)  # of a sum of squares, see nybble.quant.search
TINY = tl.constexpr(1e-38)  # what divides in place of zero, see nybble.quant.search


class Launch(NamedTuple):
    """Shape of a launch: the threads are the same whatever the width of a wave."""

    tile: int  # dequantize: chunks of 32 weights; encoder: blocks, or bytes written; gemv: words of each row at a time
    warps: dict[int, int]  # threads in a wave -> waves in a program


# By reading the code made for them (tools/kernel_code): with 256 threads nothing spills, and the decoder keeps below
# 64 registers a thread on gfx9 (8 waves a SIMD) and 96 on gfx11 and gfx12 (16). Waves are 64 wide on gfx90a, gfx942 and
# gfx950, 32 on gfx1100, gfx1151, gfx1201 and sm_*.
LAUNCHES = {
    "dequantize": Launch(256, {64: 4, 32: 8}),
    "search_scales": Launch(16, {64: 4, 32: 8}),
    "nested_codes": Launch(16, {64: 4, 32: 8}),
    "nearest_codes": Launch(1024, {64: 4, 32: 8}),
    "gemv": Launch(256, {64: 4, 32: 8}),
    "gemv many": Launch(64, {64: 4, 32: 8}),  # more than 2 rows, or rows that are no whole words: they need registers
}
GEMV_OUTPUTS = 4  # rows of the weight in one program of gemv


@triton.jit
def dequantize(
    packed_ptr,  # (ceil(n / 2),) uint8, aligned to 4 bytes
    absmax_ptr,  # (n_blocks,) float32, or uint8 if nested
    table_ptr,  # (256,) float32: values of the 8-bit codes
    nested_ptr,  # (ceil(n_blocks / 256),) float32
    offset_ptr,  # () float32
    values_ptr,  # (16,) float32: values of the 4-bit codes
    out_ptr,  # (n,) float32, float16, float64, or int16 for the bits of bfloat16
    n,
    nested: tl.constexpr,
    log_block: tl.constexpr,  # block size = 2 ** log_block
    tile: tl.constexpr,
):
    """out = value[code] * absmax[i >> log_block], rounded once (layout: nybble.quant.packed)."""
    first = tl.program_id(0).to(tl.int64) * (tile * CHUNK)
    # Whole chunks here, so that masks are constant over 16 bytes; what is left of n follows below.
    chunks = tl.minimum(n - first, tile * CHUNK).to(tl.int32) // CHUNK
    word = tl.arange(0, tile)[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + first // 8 + word, mask=word < chunks * 4, other=0)
    chunk = tl.arange(0, tile)
    block = (first >> log_block) + ((chunk * CHUNK) >> log_block)
    absmax = _absmax(block, chunk < chunks, absmax_ptr, table_ptr, nested_ptr, offset_ptr, nested)
    values = tl.load(values_ptr + tl.arange(0, 16))
    found = tl.gather(values, tl.reshape(_codes(words), [tile * CHUNK]), 0)
    decoded = tl.reshape(found, [tile, 4, 8]) * absmax[:, None, None]
    at = tl.arange(0, tile * CHUNK)
    result = tl.reshape(_rounded(decoded, out_ptr), [tile * CHUNK])
    tl.store(out_ptr + first + at, result, mask=at < chunks * CHUNK)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        # The last n % 32 weights, byte by byte: nothing past the end of `packed` is read.
        rest = first + chunks * CHUNK
        within = tl.arange(0, CHUNK)
        held = within < (n - rest).to(tl.int32)
        byte = tl.load(packed_ptr + rest // 2 + (within >> 1), mask=held, other=0).to(tl.int32)
        value = tl.load(values_ptr + ((byte >> (4 - (within & 1) * 4)) & 15))
        last = (rest >> log_block) + (within >> log_block)
        scale = _absmax(last, held, absmax_ptr, table_ptr, nested_ptr, offset_ptr, nested)
        tl.store(out_ptr + rest + within, _rounded(value * scale, out_ptr), mask=held)


@triton.jit
def search_scales(
    weights_ptr,  # (n,) float32, float16 or bfloat16
    factors_ptr,  # (n_factors,) float32, signs included
    ascending_ptr,  # (16,) float32: the values of the 4-bit codes in order
    midpoints_ptr,  # (15,) float32: between them
    scales_ptr,  # out: (n_blocks,) float32
    n,
    n_factors,
    block_size: tl.constexpr,
    tile: tl.constexpr,
):
    """Of absmax * factor the scale of least squared error, the first of equals (nybble.quant.search)."""
    first = tl.program_id(0).to(tl.int64) * tile
    block = tl.arange(0, tile)
    left = tl.minimum(n - first * block_size, tile * block_size).to(tl.int32)
    start_ptr = weights_ptr + first * block_size
    lane = block[:, None] * block_size + tl.arange(0, LANES)[None, :]
    largest = tl.zeros([tile, LANES], tl.float32)
    for i in range(0, block_size, LANES):
        weights = tl.load(start_ptr + lane + i, mask=lane + i < left, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(weights))
    absmax = tl.max(largest, axis=1)
    best = absmax
    least = tl.full([tile], float("inf"), tl.float32)
    tried = tl.arange(0, SEARCHED)
    for c in range(0, n_factors, SEARCHED):
        factors = tl.load(factors_ptr + c + tried, mask=c + tried < n_factors, other=1.0)
        scales = factors[:, None] * absmax[None, :]
        errors = _errors(start_ptr, left, scales, ascending_ptr, midpoints_ptr, block_size, tile)
        errors = tl.where((c + tried < n_factors)[:, None], errors, float("inf"))
        error, which = _first_least(errors)
        better = error < least
        best = tl.where(better, absmax * tl.load(factors_ptr + c + which, mask=better, other=1.0), best)
        least = tl.where(better, error, least)
    tl.store(scales_ptr + first + block, best, mask=block * block_size < left)


@triton.jit
def nested_codes(
    weights_ptr,  # (n,) float32, float16 or bfloat16
    scales_ptr,  # (n_blocks,) float32: the wanted scales
    nested_ptr,  # (ceil(n_blocks / 256),) float32
    offset_ptr,  # () float32
    table_ptr,  # (256,) float32: values of the 8-bit codes, ascending
    table_midpoints_ptr,  # (255,) float32: between them
    ascending_ptr,  # (16,) float32: the values of the 4-bit codes in order
    midpoints_ptr,  # (15,) float32: between them
    codes_ptr,  # out: (n_blocks,) uint8
    n,
    neighbours: tl.constexpr,  # codes tried on either side, at most 3
    block_size: tl.constexpr,
    tile: tl.constexpr,
):
    """The 8-bit code near each wanted scale with the least squared error, the first of equals (nybble.quant.search)."""
    first = tl.program_id(0).to(tl.int64) * tile
    block = tl.arange(0, tile)
    left = tl.minimum(n - first * block_size, tile * block_size).to(tl.int32)
    live = block * block_size < left
    step = tl.load(nested_ptr + ((first + block) >> 8), mask=live, other=0.0)
    offset = tl.load(offset_ptr)
    scale = tl.load(scales_ptr + first + block, mask=live, other=0.0)
    # A tensor of it: below 2^-126 a number alone is float64 to Triton before 3.9, which `div_rn` does not take.
    wanted = (scale - offset) * tl.div_rn(1.0, tl.maximum(step, tl.full([tile], TINY, tl.float32)))
    nearest = tl.zeros([tile], tl.int32)  # counts the midpoints below
    for power in tl.static_range(8):
        half = 128 >> power
        nearest += tl.where(wanted <= tl.load(table_midpoints_ptr + nearest + (half - 1)), 0, half)
    tried = tl.arange(0, SEARCHED)
    codes = tl.minimum(tl.maximum(nearest[None, :] + (tried - neighbours)[:, None], 0), 255)
    scales = tl.load(table_ptr + codes) * step[None, :] + offset
    start_ptr = weights_ptr + first * block_size
    errors = _errors(start_ptr, left, scales, ascending_ptr, midpoints_ptr, block_size, tile)
    errors = tl.where((tried <= 2 * neighbours)[:, None], errors, float("inf"))
    error, which = _first_least(errors)
    best = tl.minimum(tl.maximum(nearest + which - neighbours, 0), 255)
    best = tl.where(error < float("inf"), best, nearest)
    tl.store(codes_ptr + first + block, best.to(tl.uint8), mask=live)


@triton.jit
def nearest_codes(
    weights_ptr,  # (n,) float32, float16 or bfloat16
    scales_ptr,  # (n_blocks,) float32: as a reader decodes them
    order_ptr,  # (16,) int32: the 4-bit codes in the order of their values
    midpoints_ptr,  # (15,) float32: between the values
    packed_ptr,  # out: (ceil(n / 2),) uint8
    n,
    log_block: tl.constexpr,
    tile: tl.constexpr,  # bytes
):
    """The nearest codes for given scales, two to a byte, the first high; the lower one at an exact midpoint."""
    first = tl.program_id(0).to(tl.int64) * tile
    left = tl.minimum(n - first * 2, tile * 2).to(tl.int32)
    pair = tl.arange(0, tile)
    at = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    weights = tl.load(weights_ptr + first * 2 + at, mask=at < left, other=0.0).to(tl.float32)
    block = (first * 2 + pair * 2) >> log_block
    inverse = _inverse(tl.load(scales_ptr + block, mask=pair * 2 < left, other=1.0))
    high, low = tl.split(_nearest(weights * inverse[:, None], order_ptr, midpoints_ptr))
    tl.store(packed_ptr + first + pair, (high * 16 + low).to(tl.uint8), mask=pair * 2 < left)


@triton.jit
def gemv(
    x_ptr,  # (n_rows, k) float32, float16, or int16 for the bits of bfloat16
    packed_ptr,  # (ceil(n k / 2),) uint8, aligned to 4 bytes
    absmax_ptr,  # (n_blocks,) float32, or uint8 if nested
    table_ptr,  # (256,) float32: values of the 8-bit codes
    nested_ptr,  # (ceil(n_blocks / 256),) float32
    offset_ptr,  # () float32
    values_ptr,  # (16,) float32: values of the 4-bit codes
    out_ptr,  # (n_rows, n) of the type of x
    n,
    k,
    n_rows,
    nested: tl.constexpr,
    log_block: tl.constexpr,
    aligned: tl.constexpr,  # k is a multiple of 8: no word lies in two rows
    rows: tl.constexpr,  # n_rows or the next power of two
    outputs: tl.constexpr,
    tile: tl.constexpr,
):
    """out = x W^T, sums in float32; a program makes `outputs` columns of it for all rows of x."""
    column = tl.program_id(0) * outputs + tl.arange(0, outputs)
    row = tl.arange(0, rows)
    word = tl.arange(0, tile)
    within = tl.arange(0, 8)
    values = tl.load(values_ptr + tl.arange(0, 16))
    sums = tl.zeros([rows, outputs, tile], tl.float32)
    for start in range(0, tl.cdiv(k, 8), tile):
        if aligned:
            here = start + word
            live = (column < n)[:, None] & (here < k // 8)[None, :]
            whole = column[:, None] * (k // 8) + here[None, :]  # 32 bits suffice for 2^34 weights
            codes = _codes(tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + whole, mask=live, other=0))
            absmax = _absmax(whole >> (log_block - 3), live, absmax_ptr, table_ptr, nested_ptr, offset_ptr, nested)
            x_live = (here < k // 8)[None, :, None] & (row < n_rows)[:, None, None]
        else:
            inner = (start + word)[:, None] * 8 + within[None, :]
            live = (column < n)[:, None, None] & (inner < k)[None, :, :]
            element = column.to(tl.int64)[:, None, None] * k + inner[None, :, :]
            byte = tl.load(packed_ptr + (element >> 1), mask=live, other=0).to(tl.int32)
            codes = (byte >> (4 - (element & 1).to(tl.int32) * 4)) & 15
            absmax = _absmax(element >> log_block, live, absmax_ptr, table_ptr, nested_ptr, offset_ptr, nested)
            x_live = (inner < k)[None, :, :] & (row < n_rows)[:, None, None]
        found = tl.reshape(tl.gather(values, tl.reshape(codes, [outputs * tile * 8]), 0), [outputs, tile, 8])
        x_at = row[:, None, None] * k + ((start + word)[:, None] * 8 + within[None, :])[None, :, :]
        x = _widened(tl.load(x_ptr + x_at, mask=x_live, other=0))
        if aligned:  # the 8 weights of a word share a scale
            sums += tl.sum(x[:, None, :, :] * found[None, :, :, :], axis=3) * absmax[None, :, :]
        else:
            sums += tl.sum(x[:, None, :, :] * (found * absmax)[None, :, :, :], axis=3)
    result = _rounded(tl.sum(sums, axis=2), out_ptr)
    live = (row < n_rows)[:, None] & (column < n)[None, :]
    tl.store(out_ptr + row[:, None].to(tl.int64) * n + column[None, :], result, mask=live)


@triton.jit
def _codes(words):
    """The 8 codes of each 32-bit word in a last dimension: in each byte the high nibble comes first."""
    shifts = (tl.arange(0, 8) ^ 1) * 4
    return (tl.expand_dims(words, 2) >> shifts[None, None, :]) & 15


@triton.jit
def _absmax(block, live, absmax_ptr, table_ptr, nested_ptr, offset_ptr, nested: tl.constexpr):
    """Scales of blocks: code8[byte] * nested[block // 256] + offset in two roundings, or as they are."""
    if nested:
        code = tl.load(absmax_ptr + block, mask=live, other=0).to(tl.int32)
        step = tl.load(nested_ptr + (block >> 8), mask=live, other=0.0)
        absmax = tl.load(table_ptr + code) * step + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=live, other=0.0)
    return absmax


@triton.jit
def _rounded(x, out_ptr):
    """float32 to what `out_ptr` holds, to nearest even; int16 takes the bits of bfloat16.

    In integers, since Triton's interpreter truncates to bfloat16 and AMD before gfx950 has no instruction for it: half
    of the last kept place, less one if that place is even, is added to the bits, and a carry is right in the exponent
    too. For finite and infinite x.
    """
    if out_ptr.dtype.element_ty == tl.int16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = bits.to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        result = x.to(out_ptr.dtype.element_ty)
    return result


@triton.jit
def _widened(x):
    """To float32; int16 holds the bits of bfloat16."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _inverse(scales):
    return tl.div_rn(1.0, tl.where(tl.abs(scales) < TINY, TINY, scales))


@triton.jit
def _nearest(scaled, table_ptr, midpoints_ptr):
    """table[number of midpoints below]; 15 comparisons, and no number passes for the largest, as in torch.bucketize."""
    found = tl.zeros_like(scaled).to(table_ptr.dtype.element_ty) + tl.load(table_ptr)
    for i in tl.static_range(15):
        found = tl.where(scaled <= tl.load(midpoints_ptr + i), found, tl.load(table_ptr + i + 1))
    return found


@triton.jit
def _errors(
    start_ptr, left, scales, ascending_ptr, midpoints_ptr, block_size: tl.constexpr, tile: tl.constexpr
):  # (SEARCHED, tile)
    """Squared error of each block under each scale, in the order that nybble.quant.search fixes; not finite: inf."""
    inverse = _inverse(scales)[:, :, None]
    lane = tl.arange(0, tile)[:, None] * block_size + tl.arange(0, LANES)[None, :]
    lanes = tl.zeros([SEARCHED, tile, LANES], tl.float32)
    for i in range(0, block_size, LANES):
        weights = tl.load(start_ptr + lane + i, mask=lane + i < left, other=0.0).to(tl.float32)[None, :, :]
        difference = weights - _nearest(weights * inverse, ascending_ptr, midpoints_ptr) * scales[:, :, None]
        lanes += difference * difference
    # Two terms a sum: no order to choose.
    lanes = tl.sum(tl.reshape(lanes, [SEARCHED, tile, 2, 8]), axis=2)
    lanes = tl.sum(tl.reshape(lanes, [SEARCHED, tile, 2, 4]), axis=2)
    lanes = tl.sum(tl.reshape(lanes, [SEARCHED, tile, 2, 2]), axis=2)
    errors = tl.sum(lanes, axis=2)
    return tl.where(errors < float("inf"), errors, float("inf"))


@triton.jit
def _first_least(errors):  # (SEARCHED, tile) -> (tile,) float32 and (tile,) int32
    """The least error of each block and the first place where it stands."""
    least = tl.min(errors, axis=0)
    place = tl.arange(0, SEARCHED)[:, None]
    return least, tl.min(tl.where(errors == least[None, :], place, SEARCHED - 1), axis=0)
