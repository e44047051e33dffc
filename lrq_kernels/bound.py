"""Operations tied to their tensors, for loops and CUDA graphs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lrq_kernels import dispatch

_AS_IT_IS = contextlib.nullcontext()


class Bound:
    """An operation tied to its tensors: every call fills ``outputs`` anew from what the inputs then hold.

    Arguments were checked, the backend chosen and the outputs allocated once. The inputs may hold other values at every
    call, or lie elsewhere (``parameter.data = ...``), in the shape, type and device in which they were bound: anything
    else raises RuntimeError. ``outputs`` are given to the kernel unchecked: resize none of them.
    """

    def __init__(self, operation: str, backend: str, inputs: dict[str, Any], outputs: Any) -> None:
        self.operation, self.backend, self.outputs = operation, backend, outputs
        self._inputs = tuple(inputs.values())
        self._filled = outputs if isinstance(outputs, tuple) else (outputs,)
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        self._bound = [(name, x, x.shape, x.dtype, x.device) for name, x in tensors.items()]
        self._derives = backend == "reference" or any(x.requires_grad for x in tensors.values())

    def __call__(self) -> Any:
        for name, x, shape, dtype, device in self._bound:
            if x.shape != shape or x.dtype is not dtype or x.device != device:
                raise RuntimeError(
                    f"{self.operation}: {name} was bound as {_described(shape, dtype, device)}, is"
                    f" {_described(x.shape, x.dtype, x.device)}: bind again"
                )
        # Rounding has no derivative: outputs must not require one.
        with torch.no_grad() if self._derives else _AS_IT_IS:
            dispatch.run(self.operation, self.backend, self._inputs, self._filled)
        return self.outputs


def _described(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"


def _check_memory(operation: str, name: str, x: Any) -> None:
    """Raise unless the numbers of ``x`` lie in its memory."""
    if not isinstance(x, Tensor):
        return
    if isinstance(x, FakeTensor):
        raise TypeError(f"{operation}: {name}: a FakeTensor has no memory to bind; call the operation instead")
    if x.is_neg() or x.is_conj():
        pending = "negation" if x.is_neg() else "conjugation"
        raise ValueError(f"{operation}: {name}: a view with a pending {pending} can't be bound: bind {name}.clone()")


def bind(operation: str, *args: Any, **kwargs: Any) -> Bound:
    """Tie ``operation`` to its arguments: check them, choose the backend and allocate the outputs now, compute later.

    Example: ``quantize = lrq_kernels.bind("quantize_nvfp4", w)``, then ``quantize()`` as often as ``w`` changes.

    Raises:
        ValueError, TypeError: as the operation does; or an input has no memory (FakeTensor), or not as its values are
            (the imaginary part of a conjugate, ``torch._neg_view``).
        RuntimeError: no backend takes these inputs.
    """
    contract, arguments = dispatch.arguments_of(operation, args, kwargs)
    for name, x in arguments.items():
        _check_memory(operation, name, x)
    outputs = contract(*arguments.values())
    for x in outputs if isinstance(outputs, tuple) else (outputs,):
        _check_memory(operation, "outputs", x)
    return Bound(operation, dispatch.choose(operation, tuple(arguments.values())), arguments, outputs)
