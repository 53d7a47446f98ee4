"""Error feedback and repair: less error at a layer's output, on the grid of the format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.kernels.ops4bit import cpu
from nybble.quant import (
    codebook,
    decode,
    decode_absmax,
    encode_calibrated,
    encode_searched,
    factorise,
    feedback,
    low_rank,
)


def inputs(n: int, features: int) -> Tensor:
    """Correlated inputs of uneven size, as a layer's are."""
    mix = torch.randn(features, features) / features**0.5 + torch.eye(features)
    return torch.randn(n, features) * torch.logspace(-1, 1, features) @ mix


def moments_of(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def output_errors(x: Tensor, weight: Tensor, decoded: Tensor) -> Tensor:
    return ((weight - decoded) @ x.t()).square().mean(dim=1)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block_size"), [((96, 128), 64), ((40, 172), 64), ((7, 300), 32), ((33, 64), 4096)])
def test_outputs_are_closer_row_by_row(shape: tuple[int, int], block_size: int, quant_type: str) -> None:
    weight, x = torch.randn(shape), inputs(2000, shape[1])
    moments = moments_of(x)
    nearest = decode(encode_searched(weight, quant_type, block_size))
    fitted = decode(encode_calibrated(weight, moments, quant_type, block_size))
    before, after = output_errors(x, weight, nearest), output_errors(x, weight, fitted)
    assert after.sum() < 0.5 * before.sum()
    factors = factorise(moments)
    assert factors is not None
    rows = [((weight - w) @ factors.damped * (weight - w)).sum(dim=1) for w in (fitted, nearest)]
    assert (rows[0] <= rows[1] * (1 + 1e-4)).all()


@pytest.mark.parametrize("sweeps", [0, 1])
def test_feedback_helps_by_itself_and_sweeps_help_further(sweeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(96, 128), inputs(2000, 128)
    errors = []
    for n in (sweeps, sweeps + 1):
        monkeypatch.setattr(feedback, "SWEEPS", n)
        errors.append(output_errors(x, weight, decode(encode_calibrated(weight, moments_of(x)))).sum())
    assert errors[0] < 0.5 * output_errors(x, weight, decode(encode_searched(weight))).sum()
    assert errors[1] < errors[0]


@pytest.mark.parametrize("features", [3, 128, 600])
def test_the_factor_is_the_root_of_the_inverse(features: int) -> None:
    factors = factorise(moments_of(inputs(1000, features)))
    assert factors is not None
    activity = factors.damped.diagonal()[factors.order]
    assert (activity[:-1] >= activity[1:]).all()
    wanted = factors.damped[factors.order][:, factors.order].double()
    upper = factors.upper.double()
    assert torch.equal(factors.upper, factors.upper.triu())
    torch.testing.assert_close(upper.t() @ upper @ wanted, torch.eye(features).double(), rtol=0, atol=2e-3)


def test_moments_that_are_hardly_positive_definite_are_damped_more() -> None:
    moments = torch.eye(64)
    moments[0, 1] = moments[1, 0] = 1.05
    factors = factorise(moments)
    assert factors is not None
    torch.testing.assert_close(factors.damped.diagonal(), torch.full((64,), 1.1))
    moments[0, 1] = moments[1, 0] = 5.0
    assert factorise(moments) is None


def test_weights_with_the_same_inputs_share_their_factors() -> None:
    weight, moments = torch.randn(32, 128), moments_of(inputs(500, 128))
    assert torch.equal(encode_calibrated(weight, factorise(moments)).packed, encode_calibrated(weight, moments).packed)
    assert torch.equal(encode_calibrated(weight, None).packed, encode_searched(weight).packed)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("outputs", [1, 64, 200])
def test_native_columns_have_the_bits_of_torch(quant_type: str, outputs: int) -> None:
    moments = moments_of(inputs(500, 160))
    factors = factorise(moments)
    assert factors is not None
    columns, pull = torch.randn(100, outputs), torch.randn(100, outputs)
    scales = torch.randn(100, outputs)
    scales[::7] = 0.0
    scales[0] = codebook(quant_type)[5]
    part = slice(30, 130)
    left = [columns.clone(), columns.clone()]
    fed = [
        b.feed_back(x, factors.upper[part, part], scales, quant_type)
        for b, x in zip((cpu, feedback), left, strict=True)
    ]
    assert torch.equal(*left)
    assert all(map(torch.equal, *fed))
    chosen, pulls = [columns.clone(), columns.clone()], [pull.clone(), pull.clone()]
    moved = [
        b.descend(x, y, factors.damped[part, part], scales, quant_type)
        for b, x, y in zip((cpu, feedback), chosen, pulls, strict=True)
    ]
    assert torch.equal(*moved)
    assert torch.equal(*chosen)
    assert torch.equal(*pulls)


def test_scales_are_those_of_the_search() -> None:
    weight, moments = torch.randn(32, 128), moments_of(inputs(500, 128))
    fitted, searched = encode_calibrated(weight, moments), encode_searched(weight)
    assert torch.equal(decode_absmax(fitted), decode_absmax(searched))
    assert not torch.equal(fitted.packed, searched.packed)


def test_uncorrelated_even_inputs_leave_nearest_rounding() -> None:
    weight = torch.randn(16, 64)
    assert torch.equal(encode_calibrated(weight, torch.eye(64)).packed, encode_searched(weight).packed)


@pytest.mark.parametrize("moments", [torch.zeros(64, 64), torch.full((64, 64), torch.nan)], ids=["zero", "nan"])
def test_without_usable_moments_codes_are_the_nearest(moments: Tensor) -> None:
    weight = torch.randn(16, 64)
    assert torch.equal(encode_calibrated(weight, moments).packed, encode_searched(weight).packed)


def test_inputs_that_never_occur_do_no_harm() -> None:
    x = inputs(300, 64)
    x[:, 5:9] = 0.0
    weight = torch.randn(16, 64)
    fitted = decode(encode_calibrated(weight, moments_of(x)))
    assert torch.isfinite(fitted).all()
    assert output_errors(x, weight, fitted).sum() < output_errors(x, weight, decode(encode_searched(weight))).sum()


def test_moments_of_another_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 64\) does not go with moments \(32, 32\)"):
        encode_calibrated(torch.randn(4, 64), torch.eye(32))


def test_low_rank_is_the_truncated_decomposition() -> None:
    difference = torch.randn(48, 80)
    a, b = low_rank(difference, None, 8)
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    best = (u[:, :8] * s[:8]) @ v[:8]
    assert a.shape == (8, 80)
    assert b.shape == (48, 8)
    assert (difference - b @ a).norm() <= 1.002 * (difference - best).norm()
    torch.testing.assert_close(a.norm(), b.norm(), rtol=0.05, atol=0)


def test_low_rank_with_moments_is_best_at_the_output() -> None:
    difference, x = torch.randn(48, 64), inputs(1000, 64)
    factors = factorise(moments_of(x))
    assert factors is not None
    a, b = low_rank(difference, factors.damped, 8)
    root = torch.linalg.cholesky(factors.damped)
    singular = torch.linalg.svdvals(difference @ root)
    assert ((difference - b @ a) @ root).norm() <= 1.002 * singular[8:].norm()


def test_a_rank_beyond_the_weight_is_filled_with_zeros() -> None:
    difference = torch.randn(4, 64)
    a, b = low_rank(difference, None, 16)
    torch.testing.assert_close(b @ a, difference, rtol=1e-4, atol=1e-4)
    assert (a[4:] == 0).all()
    assert (b[:, 4:] == 0).all()


def test_the_runs_own_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    low_rank(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), None, 2)
    assert torch.equal(torch.rand(4), expected)
