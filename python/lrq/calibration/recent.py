"""The sums over the inputs that came last, for layers that get the same ones, as queries, keys and values do."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lrq.calibration.accumulator import Accumulator, Sums, chunk_of


class Recent:
    """Keeps the sums of one tensor, for others than those that have them."""

    def __init__(self) -> None:
        self._tensors: tuple[weakref.ref[Tensor], ...] = ()
        self._about: tuple[object, ...] = ()
        self._sums: list[Sums] = []
        self._served: list[Accumulator] = []

    def sums(
        self, accumulator: Accumulator, x: Tensor, mask: Tensor | None, device: torch.device | str
    ) -> Iterable[Sums]:
        """The sums of an accumulator over inputs, made on a device.

        Those that are kept are given again for the same tensor, unchanged as far as its version tells, to an
        accumulator of the same kind that has not had them: a tensor that comes again to the same layer is another
        batch, whatever its version.
        """
        given = (x,) if mask is None else (x, mask)
        about = _about(accumulator, given, device)
        same = len(given) == len(self._tensors) and all(
            ref() is one for ref, one in zip(self._tensors, given, strict=True)
        )
        if about and same and about == self._about and not any(one is accumulator for one in self._served):
            self._served.append(accumulator)
            return self._sums
        self.forget()
        made = accumulator.sums_of(x.to(device), None if mask is None else mask.to(device))
        # Of more than a chunk they would take more memory than they save time.
        if not about or x.numel() > chunk_of(x):
            return made
        self._tensors, self._about = tuple(map(weakref.ref, given)), about
        self._sums, self._served = list(made), [accumulator]
        return self._sums

    def forget(self) -> None:
        """Give the memory back."""
        self._tensors, self._about, self._sums, self._served = (), (), [], []


def _about(accumulator: Accumulator, given: tuple[Tensor, ...], device: torch.device | str) -> tuple[object, ...]:
    """What must be the same for the sums to be; empty if it can't be told, or sharing does harm.

    A tensor of inference mode has no version, one that is watched can't be swapped (``torch.utils.swap_tensors``), and
    a compiler may put results that are equal into one tensor.
    """
    if torch.compiler.is_compiling() or any(one.is_inference() or isinstance(one, nn.Parameter) for one in given):
        return ()
    stream = torch.cuda.current_stream(given[0].device).cuda_stream if given[0].is_cuda else 0
    return (accumulator.kind, device, stream, *(one._version for one in given))
