"""What bench_kernels.py measures: every operation as users call it, and peers for the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import lrq_kernels
from lrq_kernels.minifloat import encode_e4m3, nearest_e2m1

Args = tuple[object, ...]
Run = Callable[[], object]
BLOCK, GROUP = 128, 256


@dataclass(frozen=True)
class Case:
    """One operation with its settings; ``arguments`` makes them from a weight."""

    name: str
    operation: str
    arguments: Callable[[Tensor], Args]
    peers: tuple[str, ...] = ()


def _tensor_scale(x: Tensor, largest: float) -> Tensor:
    return lrq_kernels.amax(x).float() / largest


def _packed(x: Tensor, operation: str, *settings: object) -> tuple[Tensor, ...]:
    return getattr(lrq_kernels, operation)(x, *settings)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _scaled(name: str, largest: float, more: Args = ()) -> Iterator[Case]:
    """The cases of FP8 or INT8."""
    quantize, label = f"quantize_{name}", f"quantize {name.upper()}"
    peers = (f"kitchen {name}",)
    scale = partial(_tensor_scale, largest=largest)
    yield Case(f"{label} tensor, scale given", quantize, lambda x: (x, "tensor", 0, scale(x), *more), peers)
    yield Case(f"{label} tensor", quantize, lambda x: (x, "tensor", 0, None, *more), (f"kitchen {name} amax",))
    row_peers = ("kitchen int8 row",) if name == "int8" else ()
    yield Case(f"{label} row", quantize, lambda x: (x, "row", 0, None, *more), row_peers)
    yield Case(f"{label} block {BLOCK}", quantize, lambda x: (x, "block", BLOCK, None, *more))


def _unscaled(name: str) -> Iterator[Case]:
    for scaling, block in (("tensor", 0), ("row", 0), ("block", BLOCK)):

        def arguments(x: Tensor, scaling: str = scaling, block: int = block) -> Args:
            settings = (0, torch.bfloat16) if name == "int8" else (torch.bfloat16,)
            return (*_packed(x, f"quantize_{name}", scaling, block), *settings)

        peers = (f"kitchen dequantize {name}",) if scaling == "tensor" else ()
        yield Case(f"dequantize {name.upper()} {scaling}", f"dequantize_{name}", arguments, peers)


def cases() -> Iterator[Case]:
    """Every operation."""
    nvfp4 = partial(_tensor_scale, largest=448 * 6)
    yield Case(
        "quantize NVFP4, scale given",
        "quantize_nvfp4",
        lambda x: (x, nvfp4(x), None),
        ("kitchen nvfp4", "torchao nvfp4"),
    )
    yield Case("quantize NVFP4", "quantize_nvfp4", lambda x: (x, None, None), ("kitchen nvfp4 amax",))
    yield Case("quantize NVFP4, best scales", "quantize_nvfp4", lambda x: (x, nvfp4(x), 4.0))
    yield Case("quantize MXFP8", "quantize_mxfp8", lambda x: (x, None), ("kitchen mxfp8", "torchao mxfp8"))
    yield Case("quantize MXFP8, best scales", "quantize_mxfp8", lambda x: (x, 4.0))
    yield from _scaled("fp8", 448.0)
    yield from _scaled("int8", 127.0, (0,))
    yield Case(f"quantize INT8 row, Hadamard {GROUP}", "quantize_int8", lambda x: (x, "row", 0, None, GROUP))
    yield Case(
        "dequantize NVFP4",
        "dequantize_nvfp4",
        lambda x: (*_packed(x, "quantize_nvfp4"), *_size(x), torch.bfloat16),
        ("kitchen dequantize nvfp4",),
    )
    yield Case(
        "dequantize MXFP8",
        "dequantize_mxfp8",
        lambda x: (*_packed(x, "quantize_mxfp8"), *_size(x), torch.bfloat16),
        ("kitchen dequantize mxfp8",),
    )
    yield from _unscaled("fp8")
    yield from _unscaled("int8")
    yield Case("amax", "amax", lambda x: (x,))
    yield Case(f"rotate Hadamard {GROUP}", "rotate_hadamard", lambda x: (x, GROUP))
    yield Case("step of rounding, E2M1", "rounding_step", partial(_step, grid="e2m1", block=16))
    yield Case("step of rounding, E4M3", "rounding_step", partial(_step, grid="e4m3", block=32))
    yield Case("pack FP4", "pack_fp4", lambda x: (_bytes(x) & 15, True))
    yield Case("unpack FP4", "unpack_fp4", lambda x: (_bytes(x), True))
    yield Case("swizzle scales", "swizzle_scales", lambda x: (_bytes(x),))
    yield Case(
        "unswizzle scales", "unswizzle_scales", lambda x: (lrq_kernels.swizzle_scales(_bytes(x)), *_bytes(x).shape[-2:])
    )


def _step(x: Tensor, grid: str, block: int) -> Args:
    """A rounded weight, the gradient in float32, a fifth of the weights to move if they gain."""
    *batch, rows, columns = x.shape
    largest, nearest = {"e2m1": (6, nearest_e2m1), "e4m3": (448, lambda y: encode_e4m3(y).float())}[grid]
    blocks = x.float().unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1) / largest
    error = nearest(blocks / scale[..., None]) * scale[..., None] - blocks
    values = ((error + blocks) / scale[..., None]).flatten(-2)
    curvatures = [x.new_full((*batch, size), 0.2, dtype=torch.float32) for size in (rows, columns)]
    plain_weight, share = (x.new_full(batch, number, dtype=torch.float32) for number in (0.1, 0.2))
    return (
        x,
        nearest(values).bfloat16(),
        scale,
        1,
        block,
        error.flatten(-2).roll(1, -1) * 0.3,
        *curvatures,
        plain_weight,
        share,
        0,
        1,
        grid,
    )


def _bytes(x: Tensor) -> Tensor:
    """As many bytes as ``x`` has weights."""
    return x.view(torch.uint8)[..., : x.shape[-1]].contiguous()


def peer(name: str, args: Args) -> Run:
    """The call of a peer for the arguments of a case; raises where it is not installed or can't do it."""
    package, _, work = name.partition(" ")
    return (_kitchen if package == "kitchen" else _torchao)(work, args)


def _kitchen(work: str, args: Args) -> Run:
    import comfy_kitchen as kitchen

    if args[0].dim() == 3:
        raise ValueError("takes one matrix")
    x = args[0]
    calls: dict[str, Run] = {
        "nvfp4": lambda: kitchen.quantize_nvfp4(x, args[1]),
        "nvfp4 amax": lambda: kitchen.quantize_nvfp4(x, x.abs().amax().float() / (448 * 6)),
        "mxfp8": lambda: kitchen.quantize_mxfp8(x),
        "fp8": lambda: kitchen.quantize_per_tensor_fp8(x, args[3]),
        "fp8 amax": lambda: kitchen.quantize_per_tensor_fp8(x, x.abs().amax().float() / 448),
        "int8": lambda: kitchen.quantize_int8_tensorwise(x, args[3]),
        "int8 amax": lambda: kitchen.quantize_int8_tensorwise(x),
        "int8 row": lambda: kitchen.quantize_int8_rowwise(x),
        "dequantize nvfp4": lambda: kitchen.dequantize_nvfp4(x, args[2], args[1]),
        "dequantize mxfp8": lambda: kitchen.dequantize_mxfp8(x, args[1]),
        "dequantize fp8": lambda: kitchen.dequantize_per_tensor_fp8(x, args[1]),
        "dequantize int8": lambda: kitchen.dequantize_int8_simple(x, args[1]),
    }
    return calls[work]


_compiled: dict[str, Callable] = {}


def _torchao(work: str, args: Args) -> Run:
    x = args[0]
    if work not in _compiled:
        _compiled[work] = torch.compile(_torchao_functions()[work])
    return partial(_compiled[work], x, *args[1:2])


def _torchao_functions() -> dict[str, Callable]:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    def mxfp8(x: Tensor, _: object) -> object:
        return to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL, is_swizzled_scales=True)

    return {"mxfp8": mxfp8, "nvfp4": lambda x, scale: nvfp4_quantize(x, 16, scale)}
