"""Error feedback and repair: less error at a layer's output, on the grid of the format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.quant import decode, decode_absmax, encode_calibrated, encode_searched, feedback, low_rank
from nybble.quant.feedback import damp


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
    damped = damp(moments)
    assert damped is not None
    rows = [((weight - w) @ damped * (weight - w)).sum(dim=1) for w in (fitted, nearest)]
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
    damped = damp(moments_of(x))
    assert damped is not None
    a, b = low_rank(difference, damped, 8)
    root = torch.linalg.cholesky(damped)
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
