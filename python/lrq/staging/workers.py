"""Layers that are computed side by side on a GPU: what one leaves idle, another uses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, TypeVar

import torch

from lrq.staging.process import give_back_workspaces

R = TypeVar("R")


class Workers:
    """So many threads, each on a stream of its own; one: the caller's thread. Use it in a ``with`` statement.

    An eigendecomposition is a row of small kernels with words to the host between them; products of another layer fill
    the gaps. What a layer becomes does not hang on its neighbours.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(count, "compute") if count > 1 else None
        self._free = threading.Semaphore(count)
        self._running: list[Future] = []
        self._own = threading.local()

    def submit(self, call: Callable[..., R], *args: Any) -> Future[R]:
        """Begin a call as soon as a thread is free: until then the caller waits."""
        if self._pool is None:
            return self.call_here(call, *args)
        self._free.acquire()
        self._running = [one for one in self._running if not one.done()]
        future = self._pool.submit(self._call, call, *args)
        future.add_done_callback(lambda _: self._free.release())
        self._running.append(future)
        return future

    def call_here(self, call: Callable[..., R], *args: Any) -> Future[R]:
        """Call it in this thread, alone."""
        wait(self._running)
        future: Future[R] = Future()
        future.set_result(call(*args))
        return future

    def _call(self, call: Callable[..., R], *args: Any) -> R:
        with self._stream():
            return call(*args)

    def _stream(self) -> contextlib.AbstractContextManager:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._own.stream)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=kind is not None)
            # Its streams are nobody's any more.
            give_back_workspaces(self._device)
