"""Learned rounding of tensors: the library call for tools that hold weights in memory."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lrq.config import Rounding
from lrq.errors import InputError, printable
from lrq.formats import FORMATS, Tensors
from lrq.rounding import solve
from lrq.settings import check_ranges

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize_layers(
    weights: Iterable[Tensor], format: str = "nvfp4", *, seed: int = 0, **settings: Any
) -> list[Tensors]:
    """Quantize weights with learned rounding, on their device; those of one shape and dtype together.

    Args:
        weights: [N,K] or [E,N,K] each, float32, bfloat16, float16 or float64, finite.
        format: a key of ``lrq.formats.FORMATS``: nvfp4, mxfp8, fp8, fp8-row, int8-row, ...
        seed: from 0 to 2^63 - 1; the same seed gives the same codes on the same device. (``lrq convert`` takes
            another for every layer, ``lrq.rounding.solve.layer_seed`` of its own and the layer's name.)
        **settings: of ``lrq convert``'s rounding, as ``projection="both"``, ``top_p=0.2``, ``simple=True``.

    Returns:
        One dict a weight, in their order: ``weight``, ``weight_scale`` and, of NVFP4, ``weight_scale_2``, as they are
        stored (docs/FORMATS.md).

    Raises:
        InputError: no such format or setting, a value of no meaning, a weight that is not finite, or of a shape that
            the format can't hold.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(FORMATS)}"
        raise InputError(f"format {printable(format)}: no such format; {hint}")
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed: must be from 0 to 2^63 - 1, is {seed}")
    rounding = _rounding(settings)
    fmt, found = FORMATS[format], dict[int, Tensors]()
    alike: dict[tuple[object, ...], list[int]] = {}
    weights = list(weights)
    for number, w in enumerate(weights):
        _check(number, w)
        refusal = fmt.refusal(tuple(w.shape))
        if refusal is not None:
            raise InputError(f"weight {number}: {format}: {refusal}")
        own = () if w.dim() == 2 else (number,)
        alike.setdefault((w.shape, w.dtype, w.device, *own), []).append(number)
    for numbers in alike.values():
        first = weights[numbers[0]]
        if first.dim() == 3:
            found[numbers[0]] = solve.quantize_layer(fmt, first, rounding, seed)[0]
            continue
        together = solve.quantize_layers(fmt, [weights[number] for number in numbers], rounding, seed)
        found |= {number: tensors for number, (tensors, _) in zip(numbers, together, strict=True)}
    return [found[number] for number in range(len(weights))]


def _check(number: int, w: Tensor) -> None:
    if not isinstance(w, Tensor) or w.dtype not in DTYPES or w.layout != torch.strided:
        what = f"{w.dtype} {w.layout}" if isinstance(w, Tensor) else type(w).__name__
        raise InputError(f"weight {number}: must be a dense tensor of {', '.join(map(str, DTYPES))}, is {what}")
    if w.dim() not in (2, 3) or not w.numel():
        raise InputError(f"weight {number}: must be [N,K] or [E,N,K], with a weight, is {list(w.shape)}")
    if not torch.isfinite(w).all():
        raise InputError(f"weight {number}: holds NaN or Inf")


def _rounding(settings: dict[str, Any]) -> Rounding:
    try:
        rounding = Rounding(**settings)
    except TypeError:
        known = Rounding.__dataclass_fields__
        wrong = next(name for name in settings if name not in known)
        near = difflib.get_close_matches(wrong, known, 1)
        raise InputError(
            f"{wrong}: no such setting; {f'did you mean {near[0]}?' if near else 'see Rounding'}"
        ) from None
    check_ranges(rounding)
    rounding.check()
    return rounding
