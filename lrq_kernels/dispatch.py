"""Who computes an operation, and why: kernels register where they stand, the first that accepts the arguments runs.

A backend is chosen before the call and never changed after a failure: a kernel that fails raises.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import lrq_kernels
from lrq_kernels import OPERATIONS

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""In order of preference."""

_MODULES = {
    "cuda": "lrq_kernels.native",
    "triton": "lrq_kernels.triton",
    "cpu": "lrq_kernels.native",
    "reference": "lrq_kernels.reference",
}


class BackendError(RuntimeError):
    """The backend that was asked for can't compute this."""


Accepts = Callable[..., "str | None"]


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation: ``run(*inputs, *outputs)`` fills the outputs."""

    run: Callable[..., None]
    accepts: Accepts


_kernels: dict[tuple[str, str], Kernel] = {}
_missing: dict[str, str] = {}
_loaded: set[str] = set()
_loading = threading.RLock()
_forced: ContextVar[tuple[str, ...]] = ContextVar("lrq_backend", default=())
"""Of the blocks that were entered, the innermost last."""


def accepts_all(*_: Any) -> None:
    """Accept any arguments that passed the contract."""
    return None


def kernel(operation: str, *, backend: str, accepts: Accepts = accepts_all) -> Callable[[Callable], Callable]:
    """Register the decorated function as the kernel of ``operation`` on ``backend``.

    ``accepts(*inputs)`` answers None, or the reason why this kernel can't take these inputs.
    """
    if operation not in OPERATIONS or backend not in BACKENDS:
        raise ValueError(f"kernel {operation!r} on backend {backend!r}: no such operation or backend")

    def register(run: Callable) -> Callable:
        _kernels[operation, backend] = Kernel(run, accepts)
        return run

    return register


def unavailable(backend: str, reason: str) -> None:
    """Say why ``backend`` has no kernels on this machine."""
    _missing[backend] = reason


def _load(backend: str) -> None:
    if backend in _loaded:
        return
    # Others wait: half of the kernels would choose another backend.
    with _loading:
        if backend in _loaded:
            return
        module = _MODULES[backend]
        together = {name for name in BACKENDS if _MODULES[name] == module}
        try:
            importlib.import_module(module)
        except ImportError as error:
            _lose(together, str(error))
        except Exception as error:  # another version of what it imports may fail in any way
            _lose(together, f"{module} does not load: {type(error).__name__}: {error}")
        _loaded.update(together)


def _lose(lost: set[str], reason: str) -> None:
    for name in lost:
        _missing[name] = reason.partition("\n")[0]
    # Those that were registered before the import failed.
    for key in [key for key in _kernels if key[1] in lost]:
        del _kernels[key]


def forced_backend() -> str | None:
    """The backend that ``use_backend`` or ``LRQ_BACKEND`` asks for.

    Raises:
        BackendError: there is none of this name.
    """
    forced = next(reversed(_forced.get()), None) or os.environ.get("LRQ_BACKEND") or None
    if forced is not None and forced not in BACKENDS:
        raise BackendError(f"LRQ_BACKEND={forced}: no such backend; choose one of {', '.join(BACKENDS)}")
    return forced


def refusal(operation: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why ``backend`` can't compute ``operation`` for these inputs, or None if it can."""
    _load(backend)
    found = _kernels.get((operation, backend))
    if found is None:
        return _missing.get(backend, "no kernel for this operation")
    return found.accepts(*args)


def _may_take(backend: str, args: tuple[Any, ...]) -> bool:
    """False where it need not be loaded to know: Triton takes 80 MB and 0.3 s, and nothing of the CPU's."""
    if backend != "triton" or backend in _loaded or os.environ.get("TRITON_INTERPRET"):
        return True
    return any(getattr(arg, "is_cuda", False) for arg in args)


def choose(operation: str, args: tuple[Any, ...]) -> str:
    """The backend that computes ``operation`` for these inputs.

    Raises:
        BackendError: the forced backend can't take them; the message says why.
    """
    forced = forced_backend()
    if forced is not None:
        reason = refusal(operation, forced, args)
        if reason is not None:
            raise BackendError(f"{operation}: backend {forced!r} was asked for, but: {reason}")
        return forced
    for backend in BACKENDS:
        if _may_take(backend, args) and refusal(operation, backend, args) is None:
            return backend
    raise RuntimeError(f"{operation}: no backend takes these inputs")


def call(operation: str, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Fill ``outputs`` with the chosen kernel.

    Raises:
        RuntimeError: the kernel failed; the message names the operation and the backend.
    """
    run(operation, choose(operation, inputs), inputs, outputs)


def run(operation: str, backend: str, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Fill ``outputs`` with the kernel of ``backend``, which accepted ``inputs``.

    Raises:
        RuntimeError: the kernel failed; the message names the operation and the backend.
    """
    try:
        _kernels[operation, backend].run(*inputs, *outputs)
    except MemoryError:
        raise
    except Exception as error:
        # Callers who make room and try again tell torch.OutOfMemoryError by its type.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise RuntimeError(f"{operation}: the {backend} kernel failed: {error}") from error


def arguments_of(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """The contract of an operation and all of its arguments by name, defaults filled in.

    Raises:
        ValueError: there is no such operation.
        TypeError: an argument is missing, or unknown.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r} does not exist; choose one of {', '.join(OPERATIONS)}")
    contract = getattr(lrq_kernels, operation).__wrapped__
    try:
        arguments = inspect.signature(contract).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{operation}: {error}") from None
    arguments.apply_defaults()
    return contract, arguments.arguments


def use_backend(backend: str) -> contextlib.AbstractContextManager[None]:
    """Force one backend inside a ``with`` block, over ``LRQ_BACKEND``.

    It holds for the thread, or the asyncio task, that enters the block, and for tasks started there; threads started
    there enter a block of their own.

    Raises:
        ValueError: there is none of this name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return _Forcing(backend)


class _Forcing(contextlib.ContextDecorator):
    """May be entered again, within itself and by other threads as well."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        _forced.set((*_forced.get(), self._backend))

    def __exit__(self, *_: object) -> None:
        _forced.set(_forced.get()[:-1])


def explain(operation: str, *args: Any, **kwargs: Any) -> dict[str, str]:
    """For each backend, ``"chosen"``, ``"accepts"`` or the reason why it can't take these inputs.

    None is chosen where ``use_backend`` or ``LRQ_BACKEND`` asks for one that can't take them.

    Raises:
        ValueError, TypeError: as the operation does.
    """
    contract, arguments = arguments_of(operation, args, kwargs)
    contract(*arguments.values())
    reasons = {backend: refusal(operation, backend, tuple(arguments.values())) for backend in BACKENDS}
    able = [backend for backend in BACKENDS if reasons[backend] is None]
    chosen = forced_backend() or able[0]
    return {backend: reason or ("chosen" if backend == chosen else "accepts") for backend, reason in reasons.items()}


def backends() -> dict[str, dict[str, str]]:
    """For each operation and backend, ``"yes"`` or the reason why there is no kernel on this machine."""
    for backend in BACKENDS:
        _load(backend)
    return {
        operation: {
            backend: _missing.get(backend) or ("yes" if (operation, backend) in _kernels else "no kernel")
            for backend in BACKENDS
        }
        for operation in OPERATIONS
    }
