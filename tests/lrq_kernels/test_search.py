"""Best scales: against brute force over every one that is tried."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lrq_kernels
import tolerances
from lrq_kernels.minifloat import encode_e4m3, nearest_e2m1
from samples import MATRICES, gaussian

COHERENCE = (0.0, 4.0, 50.0)
NAMES = [name for name in MATRICES if not name.startswith(("below", "1x1 "))]


def objective(blocks: Tensor, scale: Tensor, nearest, coherence: float) -> Tensor:
    """|E|^2 + γ<E,W>^2/|W|^2 in units of |W|^2, float64; blocks [n,b], scale [n,c] -> [n,c]."""
    w = blocks.double()[:, None]
    sigma = scale.double()[..., None]
    y = torch.where(sigma > 0, blocks[:, None] / scale[..., None], 0.0)
    error = nearest(y).double() * sigma - w
    norm = w.square().sum(-1)
    return (error.square().sum(-1) + coherence * (error * w).sum(-1).square() / norm) / norm


def blocks_of(w: Tensor, size: int) -> Tensor:
    w = w.float()
    pad = (0, -w.shape[-1] % size)
    return torch.nn.functional.pad(w, pad).reshape(-1, size)


@pytest.mark.parametrize("coherence", COHERENCE)
@pytest.mark.parametrize("name", NAMES)
def test_nvfp4_scale_is_the_best_of_all(name: str, coherence: float) -> None:
    w = MATRICES[name] if MATRICES[name].dim() == 2 else MATRICES[name][0]
    codes, swizzled, tensor_scale = lrq_kernels.quantize_nvfp4(w, None, coherence)
    columns = codes.shape[1] // 8
    chosen = lrq_kernels.unswizzle_scales(swizzled, codes.shape[0], columns)[: w.shape[0]].float().reshape(-1, 1)
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    blocks = blocks_of(w, 16)
    alive = blocks.abs().amax(1) > 0
    assert not chosen[~alive].any()
    blocks, chosen = blocks[alive], chosen[alive]
    best = objective(blocks, (tensor_scale * every).expand(len(blocks), -1), nearest_e2m1, coherence).amin(1)
    ours = objective(blocks, tensor_scale * chosen, nearest_e2m1, coherence)[:, 0]
    assert (ours <= best * (1 + tolerances.SEARCH_OBJECTIVE) + 1e-12).all()


@pytest.mark.parametrize("coherence", COHERENCE)
@pytest.mark.parametrize("name", NAMES)
def test_mxfp8_scale_is_the_better_of_two(name: str, coherence: float) -> None:
    w = MATRICES[name] if MATRICES[name].dim() == 2 else MATRICES[name][0]
    codes, swizzled = lrq_kernels.quantize_mxfp8(w, coherence)
    chosen = lrq_kernels.unswizzle_scales(swizzled, codes.shape[0], codes.shape[1] // 32)[: w.shape[0]].reshape(-1, 1)
    blocks = blocks_of(w, 32)
    alive = blocks.abs().amax(1) > 448 * 2.0**-127
    assert torch.equal(alive, chosen[:, 0] > 0)
    blocks, chosen = blocks[alive], chosen[alive].int()
    # The rule's, and the one below.
    least = torch.ceil(torch.log2(blocks.abs().amax(1).double() / 448)).clamp(min=-126)[:, None]
    two = torch.cat([least, (least - 1).clamp(min=-126)], 1)
    assert (two.eq(chosen - 127)).any(1).all()
    nearest = lambda y: encode_e4m3(y).float()  # noqa: E731
    both = objective(blocks, torch.exp2(two).float(), nearest, coherence)
    ours = objective(blocks, torch.exp2(chosen.double() - 127).float(), nearest, coherence)[:, 0]
    assert (ours <= both.amin(1) * (1 + tolerances.SEARCH_OBJECTIVE) + 1e-12).all()


def test_mxfp8_saturates_where_that_serves() -> None:
    """The scale below the rule's gains on Gaussian weights by coherence, and loses nothing by least squares."""
    w = gaussian(512, 1024)
    blocks = blocks_of(w, 32).double()

    def total(coherence: float | None, weight: float) -> tuple[float, float]:
        codes, scales = lrq_kernels.quantize_mxfp8(w, coherence)
        error = lrq_kernels.dequantize_mxfp8(codes, scales, *w.shape).reshape(-1, 32).double() - blocks
        along = (error * blocks).sum(1).square() / blocks.square().sum(1)
        return (error.square().sum(1) + weight * along).sum().item(), scales.double().sum().item()

    assert total(0.0, 0.0)[0] <= total(None, 0.0)[0]
    assert total(4.0, 4.0)[0] < 0.9995 * total(None, 4.0)[0]
    assert total(4.0, 4.0)[1] < total(None, 4.0)[1]


def frobenius(coherence: float | None, w: Tensor) -> float:
    decoded = lrq_kernels.dequantize_nvfp4(*lrq_kernels.quantize_nvfp4(w, None, coherence), *w.shape)
    return (decoded - w).norm().item()


def test_gain_on_gaussian_weights() -> None:
    """Least squares over all representable scales leaves 0.855 of the error (neighbouring ones only: 0.883)."""
    w = gaussian(1024, 1024)
    plain = frobenius(None, w)
    assert 0.845 < frobenius(0.0, w) / plain < 0.865
    assert frobenius(0.0, w) < frobenius(4.0, w) < plain


def test_coherence_removes_the_shrinking() -> None:
    """γ = 0 shrinks blocks along W; γ = 4 takes most of that away."""

    def shrinking(coherence: float) -> float:
        w = gaussian(512, 512)
        decoded = lrq_kernels.dequantize_nvfp4(*lrq_kernels.quantize_nvfp4(w, None, coherence), *w.shape)
        return abs(((decoded - w) * w).sum() / w.square().sum()).item()

    assert shrinking(4.0) < 0.5 * shrinking(0.0)
