"""What the stored tensors of one layer must be, whatever they were made from."""

from __future__ import annotations

import torch

import lrq_kernels
from lrq.checkpoint.reader import CODES, Reader
from lrq.dialects import comfyui
from lrq.formats import Format, Shape, Tensors


def check_dimensions(shape: Shape) -> None:
    """Raise ``ValueError`` unless it is that of a weight or a bank."""
    if len(shape) not in (2, 3):
        raise ValueError(f"a weight must be [N,K] or [E,N,K], got {list(shape)}")


def stored_shape(fmt: Format, shapes: dict[str, Shape]) -> Shape:
    """The padded shape of the weight, which is all that the file alone says."""
    weight = shapes["weight"]
    return (*weight[:-1], weight[-1] * 2) if fmt.name == "nvfp4" else weight


def read_tensors(output: Reader, name: str, fmt: Format, shape: Shape) -> Tensors:
    """The stored tensors of a layer; raises ``ValueError`` where dtypes or shapes are not those of the format."""
    tensors: Tensors = {}
    layout = fmt.layout(shape)
    for suffix in comfyui.STORED:
        if suffix not in layout and f"{name}.{suffix}" in output.entries:
            raise ValueError(f"{suffix} is no part of {fmt.name}")
    for suffix, (dtype, stored) in layout.items():
        entry = output.entries.get(f"{name}.{suffix}")
        if entry is None:
            raise ValueError(f"{suffix} is missing")
        if (entry.dtype, entry.shape) != (CODES[dtype], stored):
            raise ValueError(
                f"{suffix} of {fmt.name} {list(shape)} must be {CODES[dtype]} {list(stored)}, "
                f"got {entry.dtype} {list(entry.shape)}"
            )
        tensors[suffix] = output.read(entry.name)
    return tensors


def check_values(fmt: Format, tensors: Tensors, shape: Shape) -> None:
    """Raise ``ValueError`` for values that no layer holds: not finite, negative scales, padding that is not zero."""
    for suffix, tensor in tensors.items():
        if suffix == "weight" or not tensor.is_floating_point():
            continue
        values = tensor.float()
        if not (torch.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"{suffix} holds a negative or non-finite scale")
        if suffix == "weight_scale_2" and (values == 0).any():
            raise ValueError(f"{suffix} is zero")
    scales = tensors["weight_scale"]
    if fmt.name == "mxfp8" and (scales == 255).any():
        raise ValueError("weight_scale holds byte 255, which is NaN")
    if tensors["weight"].dtype == torch.int8 and (tensors["weight"] == -128).any():
        raise ValueError("weight holds the code -128; codes go from -127 to 127")
    if not torch.isfinite(fmt.dequantize(tensors, shape)).all():
        raise ValueError("the stored weight is not finite")
    if fmt.name in ("nvfp4", "mxfp8"):
        values, _ = fmt.expand(tensors, shape)
        if not same_bytes(fmt.with_codes(tensors, values)["weight"], tensors["weight"]):
            raise ValueError("the padding of its codes is not zero")
        rows, columns = shape[-2], -(-shape[-1] // (16 if fmt.name == "nvfp4" else 32))
        padded = lrq_kernels.unswizzle_scales(scales, *scales.shape[-2:])[..., :rows, :columns].contiguous()
        full = torch.zeros(scales.shape, dtype=torch.uint8)
        full[..., :rows, :columns] = padded.view(torch.uint8)
        if not same_bytes(lrq_kernels.swizzle_scales(full), scales):
            raise ValueError("the padding of its swizzled scales is not zero")


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of a size hold the same bytes."""
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
