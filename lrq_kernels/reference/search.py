"""The representable block scale that minimises ``|E|^2 + γ <E,W>^2/|W|^2``, found exactly.

Blocks and scales come in units in which neither overflows, a power of two for each block. With σ the scale, y = w/σ
and q the nearest grid value to y, the objective is ``σ²A + γ/D·(σ²C)²``: A = Σ(q−y)², C = Σ(q−y)·y, D = Σw². Candidates
are visited upwards and downwards from a start that saturates nothing, and two bounds say which can't win any more:

* doubling: where nothing saturates, the grid of 2σ is a subset of the grid of σ, so ``|E|²`` can't fall by doubling σ;
* clipping: below amax the error is at least that of the largest weight, ``(amax − max·σ)²``, and grows as σ falls.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_kernels.reference.arithmetic import tree_sum

SLACK = 0.999
"""The bounds hold in exact arithmetic; this much of them is given up to float32."""
CHUNK = 1 << 16
"""Blocks searched at a time."""


@dataclass(frozen=True)
class Candidates:
    """The scales that a format can store for a block, and the grid they scale."""

    first: int
    last: int
    octave: int
    """So many codes further the scale has doubled, from the code ``doubles_from`` on."""
    doubles_from: int
    scale: Callable[[Tensor, Tensor], Tensor]
    """(block index, code) to float32 scale in the block's units, with a finite reciprocal; it grows with the code."""
    nearest: Callable[[Tensor], Tensor]
    """Nearest grid value, saturating."""
    largest: float
    """Largest grid value."""
    zero_below: float
    """Half the smallest positive grid value: y at or below it rounds to zero."""


class _Search:
    def __init__(self, blocks: Tensor, amax: Tensor, coherence: float, candidates: Candidates) -> None:
        self.blocks, self.amax, self.candidates = blocks, amax, candidates
        self.gain = torch.full_like(amax, coherence) / tree_sum(blocks * blocks)
        self.best = torch.full_like(amax, torch.inf)
        self.best_code = torch.zeros_like(amax, dtype=torch.int32)

    def visit(self, index: Tensor, code: Tensor) -> Tensor:
        """Try ``code`` on the blocks of ``index``; returns their plain error."""
        scale, amax = self.candidates.scale(index, code), self.amax[index]
        blocks = self.blocks[index]
        # Which grid value a weight gets is decided by the quotient, as when codes are written; how far it is, by one
        # division for the block.
        y = blocks * (1 / scale)[:, None]
        error = self.candidates.nearest(blocks / scale[:, None]) - y
        square = scale * scale
        plain = square * tree_sum(error * error)
        along = square * tree_sum(error * y)
        value = plain + self.gain[index] * (along * along)
        value = torch.where(self.candidates.zero_below * scale < amax, value, torch.inf)
        best, best_code = self.best[index], self.best_code[index]
        wins = (value < best) | ((value == best) & (code < best_code))
        self.best[index] = torch.where(wins, value, best)
        self.best_code[index] = torch.where(wins, code, best_code)
        return plain

    def upwards(self, code: Tensor) -> None:
        octave, last = self.candidates.octave, self.candidates.last
        bound = self.best.new_full((len(code), octave), -torch.inf)
        phase = 0
        while ((bound * SLACK <= self.best[:, None]).any(1) & (code <= last)).any():
            index = torch.nonzero((bound[:, phase] * SLACK <= self.best) & (code <= last))[:, 0]
            plain = self.visit(index, code[index])
            doubles = code[index] + octave >= self.candidates.doubles_from
            bound[index, phase] = torch.where(doubles, plain, -torch.inf)
            code = code + 1
            phase = (phase + 1) % octave

    def downwards(self, code: Tensor) -> None:
        every = torch.arange(len(code), device=code.device)
        while True:
            scale = self.candidates.scale(every, code.clamp(min=self.candidates.first))
            clipped = (self.amax - self.candidates.largest * scale).clamp(min=0)
            index = torch.nonzero((clipped * clipped * SLACK <= self.best) & (code >= self.candidates.first))[:, 0]
            if not index.numel():
                return
            self.visit(index, code[index])
            code = code - 1


def best_scales(
    blocks: Tensor, amax: Tensor, start: Tensor, coherence: float, candidates: Callable[[slice], Candidates]
) -> Tensor:
    """Code of the best scale of every block, int32 [n]; 0 where every weight would round to zero.

    Args:
        blocks: float32 [n, block size], in units such that the scale of ``start`` is near 1.
        amax: float32 [n], positive: the largest magnitude of each block.
        start: int32 [n], a code whose scale saturates nothing (or the last).
        coherence: γ.
        candidates: for a slice of the blocks, the scales they can take.
    """
    codes = torch.empty_like(start)
    for low in range(0, len(blocks), CHUNK):
        part = slice(low, low + CHUNK)
        search = _Search(blocks[part], amax[part], coherence, candidates(part))
        search.upwards(start[part])
        search.downwards(start[part] - 1)
        codes[part] = search.best_code
    return codes
