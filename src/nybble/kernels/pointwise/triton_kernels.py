# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The Triton kernels of the pointwise operators, one source for HIP and CUDA; see `pointwise.torch` for the results.

All of them move more than they compute, so a thread moves 8 numbers at a time: 16 bytes of the 16-bit types. Norms, the
loss and rotations take a program to a row, of any width, in pieces of `tile`; what is read twice is still in the cache
the second time. bfloat16 comes as the bits in int16 (see `ops4bit.triton_kernels._rounded`). Products and sums are not
fused, as in `ops4bit.triton_kernels`: dropout must have the same bits everywhere.
"""

import triton
import triton.language as tl

from nybble.kernels.ops4bit.triton_kernels import _rounded, _widened

PER_THREAD = 8  # numbers
TILE = 2048  # at most: 256 threads
LOWEST = tl.constexpr(-3.4e38)  # under all logits, and finite: differences of two are numbers
GELU_ROOT = tl.constexpr(0.7978845608028654)  # of its tanh form (Hendrycks and Gimpel 2016)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def rms_norm(
    x_ptr,  # (n, width) float32, float16, or int16 for the bits of bfloat16
    weight_ptr,  # (width,) of any of these
    out_ptr,  # out: (n, width) as x
    rstd_ptr,  # out: (n,) float32
    width,
    eps,
    unit_offset: tl.constexpr,
    tile: tl.constexpr,
):
    """x / rms(x) times weight; rounded in between unless the weight is 1 + weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    squares = tl.zeros([tile], tl.float32)
    for start in range(0, width, tile):
        x = _widened(tl.load(x_ptr + row * width + start + column, mask=start + column < width, other=0))
        squares += x * x
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=0) / width + eps))
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, width, tile):
        live = start + column < width
        normed = _widened(tl.load(x_ptr + row * width + start + column, mask=live, other=0)) * rstd
        weight = _widened(tl.load(weight_ptr + start + column, mask=live, other=0))
        result = normed * (1.0 + weight) if unit_offset else _widened(_stored(normed, out_ptr)) * weight
        tl.store(out_ptr + row * width + start + column, _stored(result, out_ptr), mask=live)


@triton.jit
def rms_norm_backward(
    grad_ptr,  # (n, width) float32, float16, or int16 for the bits of bfloat16
    x_ptr,  # (n, width) as grad
    weight_ptr,  # (width,) of any of these
    rstd_ptr,  # (n,) float32
    out_ptr,  # out: (n, width) as grad
    width,
    unit_offset: tl.constexpr,
    tile: tl.constexpr,
):
    """With n = x rstd and g = dL/dy w: rstd (g - n mean(g n))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros([tile], tl.float32)
    for start in range(0, width, tile):
        live = start + column < width
        scaled = _scaled(grad_ptr + row * width, weight_ptr, start + column, live, unit_offset)
        products += scaled * (_widened(tl.load(x_ptr + row * width + start + column, mask=live, other=0)) * rstd)
    mean = tl.sum(products, axis=0) / width
    for start in range(0, width, tile):
        live = start + column < width
        scaled = _scaled(grad_ptr + row * width, weight_ptr, start + column, live, unit_offset)
        normed = _widened(tl.load(x_ptr + row * width + start + column, mask=live, other=0)) * rstd
        result = (scaled - normed * mean) * rstd
        tl.store(out_ptr + row * width + start + column, _stored(result, out_ptr), mask=live)


@triton.jit
def gated(gate_ptr, up_ptr, out_ptr, n, is_gelu: tl.constexpr, tile: tl.constexpr):
    """activation(gate) * up; all (n,) float32, float16, or int16 for the bits of bfloat16."""
    first = tl.program_id(0).to(tl.int64) * tile
    at = tl.arange(0, tile)
    live = at < n - first
    gate = _widened(tl.load(gate_ptr + first + at, mask=live, other=0))
    up = _widened(tl.load(up_ptr + first + at, mask=live, other=0))
    tl.store(out_ptr + first + at, _stored(gate * _share(gate, is_gelu) * up, out_ptr), mask=live)


@triton.jit
def gated_backward(grad_ptr, gate_ptr, up_ptr, n, is_gelu: tl.constexpr, tile: tl.constexpr):
    """In place: grad becomes the product, gate and up their gradients; types as in `gated`."""
    first = tl.program_id(0).to(tl.int64) * tile
    at = tl.arange(0, tile)
    live = at < n - first
    grad = _widened(tl.load(grad_ptr + first + at, mask=live, other=0))
    gate = _widened(tl.load(gate_ptr + first + at, mask=live, other=0))
    up = _widened(tl.load(up_ptr + first + at, mask=live, other=0))
    share = _share(gate, is_gelu)
    active = gate * share
    slope = active * (1.0 - share)  # d activation / dx = s + x s (1 - s) z'
    if is_gelu:
        slope = slope * (2.0 * GELU_ROOT * (1.0 + 3.0 * GELU_CUBE * gate * gate))
    tl.store(grad_ptr + first + at, _stored(active * up, grad_ptr), mask=live)
    tl.store(gate_ptr + first + at, _stored(grad * up * (share + slope), gate_ptr), mask=live)
    tl.store(up_ptr + first + at, _stored(grad * active, up_ptr), mask=live)


@triton.jit(do_not_specialize=["seed", "threshold"])
def dropout(
    x_ptr,  # (n,) float32, float16, or int16 for the bits of bfloat16
    out_ptr,  # out: (n,) as x
    n,
    seed,  # int32: the bits of a uint32
    threshold,  # the same: the smallest hash that is kept
    scale,  # of what is kept
    adds: tl.constexpr,  # to what is in out
    tile: tl.constexpr,
):
    """MurmurHash3's finalizer over place and seed chooses (nybble.kernels.pointwise.torch.kept)."""
    first = tl.program_id(0).to(tl.int64) * tile
    at = tl.arange(0, tile)
    live = at < n - first
    h = (first + at).to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    kept = (h ^ (h >> 16)) >= threshold.to(tl.uint32, bitcast=True)
    result = tl.where(kept, _widened(tl.load(x_ptr + first + at, mask=live, other=0)) * scale, 0.0)
    if adds:
        result = _widened(tl.load(out_ptr + first + at, mask=live, other=0)) + result
    tl.store(out_ptr + first + at, _stored(result, out_ptr), mask=live)


@triton.jit
def cross_entropy(
    logits_ptr,  # (n, width) float32, float16, or int16 for the bits of bfloat16; become their gradients
    labels_ptr,  # (n,) int64
    losses_ptr,  # out: (n,) float32; no number where the label is not the place of a logit
    width,
    softcap,
    is_capped: tl.constexpr,
    tile: tl.constexpr,
):
    """-log softmax(logits)[label], and softmax - one-hot. Each lane keeps its largest logit so far and its sum."""
    row = tl.program_id(0).to(tl.int64)
    start_ptr = logits_ptr + row * width
    label = tl.load(labels_ptr + row)
    column = tl.arange(0, tile)
    tops = tl.full([tile], LOWEST, tl.float32)
    totals = tl.zeros([tile], tl.float32)
    picked = tl.zeros([tile], tl.float32)
    for start in range(0, width, tile):
        live = start + column < width
        logit, _ = _logit(start_ptr + start + column, live, softcap, is_capped)
        logit = tl.where(live, logit, float("-inf"))
        higher = tl.maximum(tops, logit)
        totals = totals * tl.exp(tops - higher) + tl.exp(logit - higher)
        picked += tl.where(start + column == label, logit, 0.0)
        tops = higher
    top = tl.max(tops, axis=0)
    total = tl.sum(totals * tl.exp(tops - top), axis=0)
    loss = tl.log(total) + (top - tl.sum(picked, axis=0))
    tl.store(losses_ptr + row, tl.where((label >= 0) & (label < width), loss, float("nan")))
    for start in range(0, width, tile):
        live = start + column < width
        logit, slope = _logit(start_ptr + start + column, live, softcap, is_capped)
        grad = tl.exp(logit - top) * (1.0 / total) - tl.where(start + column == label, 1.0, 0.0)
        tl.store(start_ptr + start + column, _stored(grad * slope, logits_ptr), mask=live)


@triton.jit
def rope(
    x_ptr,  # (n, heads, width) float32, float16, or int16 for the bits of bfloat16
    cos_ptr,  # (n, 2 half) of any of these
    sin_ptr,  # as cos
    out_ptr,  # out: (n, heads, width) as x, without gaps
    heads,
    width,
    half,  # of what is rotated
    row_stride,  # of x
    head_stride,
    inverse: tl.constexpr,
    pairs: tl.constexpr,  # half or the next power of two
    rest: tl.constexpr,  # the same of width - 2 half; 0: nothing
    tile: tl.constexpr,  # heads
):
    """Halves turned by the angle of their pair; a program takes `tile` heads of a row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * tile + tl.arange(0, tile)[:, None]
    pair = tl.arange(0, pairs)[None, :]
    live = (head < heads) & (pair < half)
    from_ptr = x_ptr + row * row_stride + head * head_stride
    to_ptr = out_ptr + (row * heads + head) * width
    x1 = _widened(tl.load(from_ptr + pair, mask=live, other=0))
    x2 = _widened(tl.load(from_ptr + half + pair, mask=live, other=0))
    turn = row * half * 2 + pair
    cos1 = _widened(tl.load(cos_ptr + turn, mask=pair < half, other=0))
    cos2 = _widened(tl.load(cos_ptr + half + turn, mask=pair < half, other=0))
    sin1 = _widened(tl.load(sin_ptr + turn, mask=pair < half, other=0))
    sin2 = _widened(tl.load(sin_ptr + half + turn, mask=pair < half, other=0))
    if inverse:
        sin1, sin2 = -sin1, -sin2
    tl.store(to_ptr + pair, _stored(x1 * cos1 - x2 * sin1, out_ptr), mask=live)
    tl.store(to_ptr + half + pair, _stored(x2 * cos2 + x1 * sin2, out_ptr), mask=live)
    if rest > 0:
        channel = half * 2 + tl.arange(0, rest)[None, :]
        live = (head < heads) & (channel < width)
        tl.store(to_ptr + channel, tl.load(from_ptr + channel, mask=live, other=0), mask=live)


@triton.jit
def _stored(x, out_ptr):
    """As `out_ptr` holds it, rounded to nearest even; what is no number stays none, whatever its bits."""
    result = _rounded(x, out_ptr)
    if out_ptr.dtype.element_ty == tl.int16:
        result = tl.where(x == x, result, 0x7FC0).to(tl.int16)
    return result


@triton.jit
def _scaled(grad_ptr, weight_ptr, column, live, unit_offset: tl.constexpr):
    """The gradient of the normalised row."""
    weight = _widened(tl.load(weight_ptr + column, mask=live, other=0))
    if unit_offset:
        weight = 1.0 + weight
    return _widened(tl.load(grad_ptr + column, mask=live, other=0)) * weight


@triton.jit
def _share(x, is_gelu: tl.constexpr):
    """activation(x) / x: sigmoid(x), or (1 + tanh z) / 2 = sigmoid(2 z)."""
    inner = x
    if is_gelu:
        inner = 2.0 * GELU_ROOT * x * (1.0 + GELU_CUBE * x * x)
    return 1.0 / (1.0 + tl.exp(-inner))


@triton.jit
def _logit(at_ptr, live, softcap, is_capped: tl.constexpr):
    """A logit as it counts, and its slope by what came in."""
    logit = _widened(tl.load(at_ptr, mask=live, other=0))
    slope = 1.0
    if is_capped:
        share = _tanh(logit / softcap)
        logit = softcap * share
        slope = 1.0 - share * share
    return logit, slope


@triton.jit
def _tanh(x):
    """Near zero x + x^3 p(x^2), p by Moshier's Cephes (tanhf); elsewhere from e^2|x|."""
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, p * (square * x) + x, tl.where(x < 0, -large, large))
