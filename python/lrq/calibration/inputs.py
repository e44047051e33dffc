"""Statistics of the inputs x [K] of one layer, over tokens; merged exactly where they are sums."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SUBBITS = 3
"""A histogram has 2^3 bins of equal width in every octave of |x|,"""
LOWEST, HIGHEST = -24, 24
"""from 2^LOWEST to 2^HIGHEST; the first also holds all that is smaller (and zero), the last all that is larger."""
BINS = (HIGHEST - LOWEST) << SUBBITS
SLOTS = 256 << SUBBITS
"""Bins of all octaves of float32, that of infinity and that below its smallest among them."""
_BIAS = 127


@dataclass(frozen=True)
class InputStats:
    """Statistics of the inputs of a layer of weight [N,K].

    The second moments E[xx'] are there as a whole (``gram``), as their leading eigenpairs (``vectors``, ``values``) or
    as their diagonal alone (``second``, which is always there).
    """

    count: int
    """Tokens."""
    mean: Tensor
    """float64 [K], E[x]."""
    second: Tensor
    """float64 [K], E[x²], the diagonal of E[xx']."""
    amax: float
    """The largest |x|."""
    histogram: Tensor
    """int64 [BINS], elements by magnitude (:func:`magnitude_bins`)."""
    gram: Tensor | None = None
    """float32 [K,K], E[xx']."""
    vectors: Tensor | None = None
    """float32 [K,r], orthonormal columns: the leading eigenvectors of E[xx']."""
    values: Tensor | None = None
    """float32 [r], their eigenvalues, falling."""

    @property
    def columns(self) -> int:
        """K."""
        return self.mean.numel()

    @property
    def about(self) -> str:
        """What they are, in a few words: ``5893 tokens, E[xx'] whole``."""
        known = "E[xx'] whole" if self.gram is not None else "mean and E[x²]"
        if self.gram is None and self.values is not None:
            known = f"{len(self.values)} eigenpairs of E[xx']"
        return f"{self.count} tokens, {known}"

    def percentile(self, percent: float) -> float:
        """A magnitude that ``percent`` of all |x| do not exceed: the upper edge of a bin, ``amax`` at most."""
        below = self.histogram.cumsum(0)
        wanted = percent / 100 * below[-1].item()
        index = int(torch.searchsorted(below.double(), wanted).item())
        return min(self.amax, bin_edge(min(index, BINS - 1)))


def magnitude_bins(x: Tensor) -> Tensor:
    """Counts int64 [BINS] of |x| for ``x`` of any shape and float dtype of 16 or 32 bits."""
    return in_range(magnitude_counts(x))


def magnitude_counts(x: Tensor) -> Tensor:
    """The same over all octaves of float32, [SLOTS], int64 or int32."""
    return counts_of(magnitude_slots(x), SLOTS)


def counts_of(numbers: Tensor, bins: int) -> Tensor:
    """How often each of ``bins`` numbers occurs, int64 or int32 [bins]."""
    if numbers.is_cuda and not torch.are_deterministic_algorithms_enabled():
        # Unlike bincount this does not wait for the GPU. Of integers it is deterministic, too, but does not say so.
        return torch.histc(numbers.int(), bins, 0, bins)
    return torch.bincount(numbers.flatten(), minlength=bins)


def magnitude_slots(x: Tensor) -> Tensor:
    """Numbers of the bins over all octaves, int32 or int16, in the shape of x.

    Exponent and leading mantissa bits of a float32, or a bfloat16, are that number: 8 of equal width an octave.
    """
    if x.dtype == torch.bfloat16:
        bits, mantissa = x.contiguous().view(torch.int16), 7
    else:
        bits, mantissa = x.float().contiguous().view(torch.int32), 23
    return (bits & torch.iinfo(bits.dtype).max) >> (mantissa - SUBBITS)


def in_range(counts: Tensor) -> Tensor:
    """Counts int64 [BINS] of those over all octaves."""
    first = (_BIAS + LOWEST) << SUBBITS
    bins = counts[first : first + BINS].to(torch.int64, copy=True)
    bins[0] += counts[:first].sum()
    bins[-1] += counts[first + BINS :].sum()
    return bins


def bin_edge(index: int) -> float:
    """The upper end of a bin."""
    octave, part = divmod(index + 1, 1 << SUBBITS)
    return 2.0 ** (LOWEST + octave) * (1 + part / (1 << SUBBITS))


def merge(a: InputStats, b: InputStats) -> InputStats:
    """The statistics of both samples together.

    Count, mean, second moment, Gram matrix, maximum and histogram are those of one pass over both (Chan, Golub, LeVeque
    1979, eq. 2.1: means are moved by their difference, not summed anew). Of eigenpairs the result has the leading ones
    of both; a pair of unequal kinds has the poorer one's.

    Raises:
        ValueError: layers of different K.
    """
    if a.columns != b.columns:
        raise ValueError(f"the inputs have {a.columns} columns here and {b.columns} there")
    count = a.count + b.count
    share = b.count / count
    mean, second = a.mean + (b.mean - a.mean) * share, a.second + (b.second - a.second) * share
    diagonal = InputStats(count, mean, second, max(a.amax, b.amax), a.histogram + b.histogram)
    if a.gram is not None and b.gram is not None:
        return replace(diagonal, gram=(a.gram.double() + (b.gram.double() - a.gram.double()) * share).float())
    if (a.gram is None and a.vectors is None) or (b.gram is None and b.vectors is None):
        return diagonal
    rank = min(one.vectors.shape[1] for one in (a, b) if one.vectors is not None)
    factors = torch.cat((_factor(a, rank) * (1 - share) ** 0.5, _factor(b, rank) * share**0.5), 1)
    vectors, values, _ = torch.linalg.svd(factors, full_matrices=False)
    return replace(diagonal, vectors=vectors[:, :rank].float().contiguous(), values=values[:rank].square().float())


def _factor(stats: InputStats, rank: int) -> Tensor:
    """F float64 [K,r] with FF' the leading part of E[xx']."""
    if stats.vectors is not None and stats.values is not None:
        return stats.vectors.double() * stats.values.double().clamp(min=0).sqrt()
    assert stats.gram is not None
    values, vectors = torch.linalg.eigh(stats.gram.double())
    return vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
