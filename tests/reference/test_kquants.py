"""Blocks of GGUF: decoded by the `gguf` package, least squares that pay, and native code with the reference's bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nybble.kernels import kquants as native
from nybble.kernels import library
from nybble.quant.kquants import FORMATS, Fitted, encode_blocks, fit_blocks, pack

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

# Relative squared error of normal weights, measured (seed 0, 64 x 512), and a tenth more.
WORST = {"Q3_K": 0.0226, "Q4_K": 0.0054, "Q5_K": 0.00131, "Q6_K": 0.00031, "Q5_0": 0.00176, "Q5_1": 0.00125}
WORST |= {"IQ4_NL": 0.0059}


def decoded(encoded: Tensor, name: str) -> Tensor:
    """What a stranger's reader makes of the bytes."""
    return torch.from_numpy(gguf.dequantize(encoded.numpy(), gguf.GGMLQuantizationType[name]).copy())


def own_values(fitted: Fitted, name: str) -> Tensor:
    """The formula of the format, from the numbers themselves."""
    form = FORMATS[name]
    q = fitted.codes.float() + form.codes[0]
    if form.scales is None:
        return fitted.d[:, None, None] * q + fitted.e[:, None, None]
    scales, mins = fitted.scales.float(), fitted.mins.float()
    return (fitted.d[:, None] * scales)[..., None] * q - (fitted.e[:, None] * mins)[..., None]


def hard_rows(columns: int = 512) -> Tensor:
    """Normal rows, and rows that a format may stumble over."""
    x = torch.randn(24, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    x[0], x[1], x[2], x[3] = 0, x[1].abs(), -x[2].abs(), 0.5
    x[4] *= 1e-6
    x[5] *= 1e4
    x[6, : columns // 2] = 0
    x[7, 5] = 3.0
    return x


@pytest.fixture
def instruction_sets() -> Iterator[list[int]]:
    if library.unavailable() is not None:
        pytest.skip("there is no native library")
    yield list(range(library.load_library().nybble_best_isa() + 1))
    library.set_instruction_set(-1)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "IQ4_NL"])
def test_the_stranger_reads_the_values_that_were_chosen(name: str) -> None:
    form = FORMATS[name]
    x = torch.randn(40, form.groups, form.group, generator=torch.Generator().manual_seed(1))
    fitted = fit_blocks(x, torch.ones(1, form.groups, form.group), name)
    assert len(fitted.codes.unique()) > (form.codes[1] - form.codes[0]) * 0.8
    read = decoded(pack(fitted, name), name).view(x.shape)
    torch.testing.assert_close(read, own_values(fitted, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_those_of_the_format(name: str) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    read = decoded(encode_blocks(x, name), name)
    assert float((read - x).square().sum() / x.square().sum()) < WORST[name]


@pytest.mark.parametrize("name", FORMATS)
def test_an_importance_lowers_the_error_that_counts(name: str) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2)) ** 3
    plain, weighted = (decoded(encode_blocks(x, name, one), name) for one in (None, importance))

    def error(read: Tensor) -> float:
        return float((importance * (read - x).square()).sum())

    assert error(weighted) < 0.9 * error(plain)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "IQ4_NL"])
def test_native_code_has_the_same_bits_on_every_instruction_set(name: str, instruction_sets: list[int]) -> None:
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2)) ** 3
    importance[100:200] = 0
    expected = encode_blocks(hard_rows(), name, importance)
    for number in instruction_sets:
        library.set_instruction_set(number)
        assert torch.equal(encode_blocks(hard_rows(), name, importance, native.fit_blocks), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_hard_rows_are_finite_and_near(name: str) -> None:
    x = hard_rows()
    read = decoded(encode_blocks(x, name), name)
    assert torch.isfinite(read).all()
    assert not read[0].any()
    normal = x[8:]
    assert float((read[8:] - normal).square().sum() / normal.square().sum()) < 1.2 * WORST[name]


@pytest.mark.parametrize(
    ("weight", "importance", "says"),
    [
        (torch.zeros(2, 300), None, "rows of 300 weights are not whole blocks of 256"),
        (torch.full((2, 256), float("nan")), None, "a weight is not finite"),
        (torch.zeros(2, 256), torch.ones(255), "256 columns do not go with an importance"),
        (torch.zeros(2, 256), -torch.ones(256), "an importance is not finite or negative"),
    ],
)
def test_what_cannot_be_encoded_is_refused(weight: Tensor, importance: Tensor | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        encode_blocks(weight, "Q4_K", importance)
