"""Laws that every format keeps, over the table: a new format is tested without a new test."""

from __future__ import annotations

import pytest
import torch

import lrq_kernels
from lrq.dialects import comfyui
from lrq.formats import FORMATS, Format, Tensors, read_format
from samples import FLOATS, MATRICES, gaussian

SHAPES = [(1, 256), (64, 256), (192, 512), (2, 64, 256)]
RAGGED = [(1, 1), (1, 7), (33, 50), (100, 68), (2, 5, 40)]


def every(shapes: list[tuple[int, ...]]) -> list:
    """(format, shape) pairs that the format takes."""
    return [
        pytest.param(fmt, shape, id=f"{name}-{'x'.join(map(str, shape))}")
        for name, fmt in FORMATS.items()
        for shape in shapes
        if fmt.refusal(shape) is None
    ]


def same(a: Tensors, b: Tensors) -> bool:
    raw = lambda t: t.contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(raw(a[k]), raw(b[k])) for k in a)


@pytest.mark.parametrize(("fmt", "shape"), every(SHAPES + RAGGED))
def test_layout_is_what_is_stored(fmt: Format, shape: tuple[int, ...]) -> None:
    stored = fmt.quantize(gaussian(*shape), 4.0)
    assert fmt.layout(shape) == {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()}
    assert stored.keys() <= set(comfyui.STORED)


def unrotated(fmt: Format, prepared: torch.Tensor) -> torch.Tensor:
    """The inverse of ``fmt.prepare``."""
    group = getattr(fmt, "convrot", 0)
    return lrq_kernels.rotate_hadamard(prepared, group) if group else prepared


@pytest.mark.parametrize(("fmt", "shape"), every(SHAPES + RAGGED))
def test_codes_go_out_and_in(fmt: Format, shape: tuple[int, ...]) -> None:
    stored = fmt.quantize(gaussian(*shape), 4.0)
    values, scale = fmt.expand(stored, shape)
    assert values.shape == shape
    assert same(fmt.with_codes(stored, values), stored)
    assert torch.equal(unrotated(fmt, values * scale), fmt.dequantize(stored, shape))


@pytest.mark.parametrize(("fmt", "shape"), every(SHAPES + RAGGED))
def test_quantizing_is_nearest_on_the_grid(fmt: Format, shape: tuple[int, ...]) -> None:
    w = gaussian(*shape)
    values, scale = fmt.expand(fmt.quantize(w, None), shape)
    scale = scale.expand(shape)
    nearest = torch.where(scale > 0, fmt.grid.nearest(fmt.prepare(w) / scale), 0.0)
    assert torch.equal(values, nearest)
    assert torch.equal(fmt.grid.nearest(values), values)
    assert values.abs().max() <= fmt.grid.largest


@pytest.mark.parametrize(("fmt", "shape"), every(SHAPES))
def test_error_is_that_of_the_format(fmt: Format, shape: tuple[int, ...]) -> None:
    w = gaussian(*shape)
    error = (fmt.dequantize(fmt.quantize(w, None), shape) - w).norm() / w.norm()
    assert error < {"E2M1": 0.12, "E4M3": 0.035, "INT8": 0.012}[fmt.grid.name]


@pytest.mark.parametrize(("fmt", "shape"), every(SHAPES))
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_dtype_is_its_float32_value(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = gaussian(*shape).to(dtype)
    assert same(fmt.quantize(w, 4.0), fmt.quantize(w.float(), 4.0))


@pytest.mark.parametrize("coherence", [None, 4.0])
@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str, coherence: float | None) -> None:
    fmt = FORMATS[name]
    for w in (torch.zeros(128, 256), torch.zeros(2, 128, 256)):
        if fmt.refusal(tuple(w.shape)) is None:
            stored = fmt.quantize(w, coherence)
            assert not fmt.dequantize(stored, tuple(w.shape)).any()
            assert all(torch.isfinite(t.float()).all() for t in stored.values())


@pytest.mark.parametrize("sample", [n for n in MATRICES if MATRICES[n].shape[-1] % 64 == 0])
@pytest.mark.parametrize("name", [n for n in FORMATS if "convrot" not in n and "block" not in n])
def test_edges_of_float32_stay_finite(name: str, sample: str) -> None:
    fmt, w = FORMATS[name], MATRICES[sample] * (2.0**-8 if sample == "huge" else 1)  # the pipeline refuses beyond 2^120
    decoded = fmt.dequantize(fmt.quantize(w, 4.0), tuple(w.shape))
    assert torch.isfinite(decoded).all()
    assert (decoded.sign() * w.float().sign() >= 0).all()


@pytest.mark.parametrize(("fmt", "shape"), every(SHAPES + RAGGED))
def test_marker_describes_the_layer(fmt: Format, shape: tuple[int, ...]) -> None:
    marker = comfyui.layer_marker(fmt, shape)
    shapes = {suffix: stored for suffix, (_, stored) in fmt.layout(shape).items()}
    assert read_format(marker, shapes) == fmt
    again = comfyui.read_marker_tensor(comfyui.marker_tensor(marker).numpy().tobytes())
    assert again == marker and isinstance(marker["format"], str)
    assert comfyui.read_metadata_entry({comfyui.METADATA: comfyui.metadata_entry({"L": marker})}) == {"L": marker}


@pytest.mark.parametrize(("fmt", "shape"), every([(64, 256)]))
def test_rotation_is_undone(fmt: Format, shape: tuple[int, ...]) -> None:
    w = gaussian(*shape)
    assert (unrotated(fmt, fmt.prepare(w)) - w).abs().max() < 1e-7


def test_refusals_name_rule_and_value() -> None:
    assert FORMATS["int8-row-convrot"].refusal((64, 68)) == "K must be a multiple of the ConvRot group 256, got 68"
    assert "expert banks" in (FORMATS["int8-row-convrot"].refusal((4, 64, 256)) or "")
    assert FORMATS["int8-block"].refusal((100, 256)) == "N and K must be multiples of the block 128, got 100 x 256"
    assert FORMATS["fp8-block"].refusal((64, 256)) is None


@pytest.mark.parametrize(
    ("marker", "shapes"),
    [
        ({"format": "nvfp5"}, {"weight": (16, 8), "weight_scale": (128, 4)}),
        ({}, {"weight": (16, 8), "weight_scale": (128, 4)}),
        ({"format": "nvfp4"}, {"weight": (16, 8)}),
        ({"format": "int8_blockwise"}, {"weight": (64, 64), "weight_scale": (3, 2)}),
    ],
)
def test_contradicting_markers_are_refused(marker: dict, shapes: dict) -> None:
    with pytest.raises(ValueError, match=r"unknown format|missing|square blocks"):
        read_format(marker, shapes)
