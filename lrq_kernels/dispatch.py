"""Who computes an operation, and why: kernels register where they stand, the first that accepts the arguments runs.

A backend is chosen before the call and never changed after a failure: a kernel that fails raises.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lrq_kernels import OPERATIONS

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""In order of preference."""

_MODULES = {
    "cuda": "lrq_kernels.native",
    "triton": "lrq_kernels.triton",
    "cpu": "lrq_kernels.native",
    "reference": "lrq_kernels.reference",
}

Accepts = Callable[..., "str | None"]


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation: ``run(*inputs, *outputs)`` fills the outputs."""

    run: Callable[..., None]
    accepts: Accepts


_kernels: dict[tuple[str, str], Kernel] = {}
_missing: dict[str, str] = {}
_loaded: set[str] = set()
_forced: ContextVar[str | None] = ContextVar("lrq_backend", default=None)


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
    _loaded.add(backend)
    try:
        importlib.import_module(_MODULES[backend])
    except ImportError as error:
        _missing[backend] = str(error)


def _forced_backend() -> str | None:
    forced = _forced.get() or os.environ.get("LRQ_BACKEND") or None
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"backend {forced!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return forced


def refusal(operation: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why ``backend`` can't compute ``operation`` for these inputs, or None if it can."""
    _load(backend)
    found = _kernels.get((operation, backend))
    if found is None:
        return _missing.get(backend, "no kernel for this operation")
    return found.accepts(*args)


def choose(operation: str, args: tuple[Any, ...]) -> str:
    """The backend that computes ``operation`` for these inputs.

    Raises:
        RuntimeError: the forced backend can't take them; the message says why.
    """
    forced = _forced_backend()
    if forced is not None:
        reason = refusal(operation, forced, args)
        if reason is not None:
            raise RuntimeError(f"{operation}: backend {forced!r} was asked for, but: {reason}")
        return forced
    for backend in BACKENDS:
        if refusal(operation, backend, args) is None:
            return backend
    raise RuntimeError(f"{operation}: no backend takes these inputs")


def call(operation: str, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Fill ``outputs`` with the chosen kernel."""
    _kernels[operation, choose(operation, inputs)].run(*inputs, *outputs)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one backend inside the ``with`` block, over ``LRQ_BACKEND``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def explain(operation: str, *args: Any) -> dict[str, str]:
    """For each backend, ``"chosen"``, ``"accepts"`` or the reason why it can't take these inputs."""
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r} does not exist; choose one of {', '.join(OPERATIONS)}")
    reasons = {backend: refusal(operation, backend, args) or "accepts" for backend in BACKENDS}
    reasons[choose(operation, args)] = "chosen"
    return reasons


def backends() -> dict[str, dict[str, str]]:
    """For each operation and backend, ``"yes"`` or the reason why there is no kernel on this machine."""
    for backend in BACKENDS:
        _load(backend)
    return {
        operation: {
            backend: "yes" if (operation, backend) in _kernels else _missing.get(backend, "no kernel yet")
            for backend in BACKENDS
        }
        for operation in OPERATIONS
    }
