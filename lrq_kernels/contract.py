"""Turns a contract into a custom op: one function checks its arguments and allocates the outputs, kernels fill them.

The same function is the validation of real calls, the fake kernel of ``torch.compile``, the allocator of every backend
and, on meta tensors, the oracle of output sizes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lrq_kernels import dispatch

_library = torch.library.Library("lrq", "DEF")

Contract = TypeVar("Contract", bound=Callable[..., Any])


def operation(allocate: Contract) -> Contract:
    """Register ``allocate`` as ``torch.ops.lrq.<its name>`` and return the function that calls the op.

    ``allocate`` checks its arguments, raises ``ValueError`` or ``TypeError``, which are given the name of the op, and
    returns empty output tensors.
    """
    name = allocate.__name__
    checked = _named(allocate)
    defaults = tuple(p.default for p in inspect.signature(allocate).parameters.values())
    _library.define(name + torch.library.infer_schema(allocate, mutates_args=()))

    def run(*args: Any) -> Any:
        # The dispatcher drops trailing arguments that equal their defaults.
        args += defaults[len(args) :]
        outputs = checked(*args)
        filled = outputs if isinstance(outputs, tuple) else (outputs,)
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            # Rounding has no derivative: outputs must not require one.
            with torch.no_grad():
                dispatch.call(name, args, filled)
        else:
            dispatch.call(name, args, filled)
        return outputs

    _library.impl(name, run, "CompositeExplicitAutograd")
    # Without it torch marks the outputs as differentiable and warns in backward.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"lrq::{name}", checked, lib=_library)
    packet = getattr(torch.ops.lrq, name)

    # `wraps`: `call.__wrapped__` is the contract.
    @functools.wraps(checked)
    def call(*args: Any, **kwargs: Any) -> Any:
        return packet(*args, **kwargs)

    return call  # type: ignore[return-value]


def _named(allocate: Contract) -> Contract:
    """``allocate`` with errors of one line that begin with its name."""

    @functools.wraps(allocate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return allocate(*args, **kwargs)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            reason = str(error).partition("\n")[0]
        raise kind(f"{allocate.__name__}: {reason}")

    return checked  # type: ignore[return-value]


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, x: object) -> None:
    """Raise unless ``x`` is a dense tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: must be a dense tensor, got {x.layout}")


def check_matrix(name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raise unless ``x`` is [M,N] or [B,M,N], not empty, and of one of ``dtypes``."""
    check_tensor(name, x)
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: dtype must be one of {allowed}, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() not in (2, 3):
        raise ValueError(f"{name}: shape must be [M,N] or [B,M,N], got {list(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name}: must not be empty, got shape {list(x.shape)}")


def check_device(name: str, x: torch.Tensor, other: torch.Tensor) -> None:
    """Raise unless ``x`` lies where ``other`` does."""
    if x.device != other.device:
        raise ValueError(f"{name}: must be on {other.device}, is on {x.device}")


def check_shape(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise unless ``x`` has exactly this shape and dtype."""
    check_tensor(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name}: dtype must be {str(dtype).removeprefix('torch.')}, got {x.dtype}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: shape must be {list(shape)}, got {list(x.shape)}")


def check_size(rows: int, columns: int) -> None:
    """Raise unless a matrix can have so many rows and columns."""
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be positive, got {rows} and {columns}")


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return (value + multiple - 1) // multiple * multiple


def width(columns: int, most: int, least: int = 16) -> int:
    """A power of two from ``least`` to ``most`` that covers the columns again and again with little beyond them."""
    candidates = [1 << i for i in range(least.bit_length() - 1, most.bit_length())]
    covered = {w: round_up(columns, w) for w in candidates}
    return max(w for w in candidates if covered[w] <= 1.07 * min(covered.values()))
