"""The metric of measured inputs: outputs are off by Ex, and ``E|Ex|^2 = tr(E H E')`` with H = E[xx'].

Statistics hold H whole, its leading eigenpairs and its diagonal, or mean and diagonal alone; what is missing counts as
uncorrelated. Where a format rounds a rotated weight WQ, the inputs are Q'x, and H becomes Q'HQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrq.calibration.inputs import InputStats
from lrq.config import Rounding
from lrq.formats import Format
from lrq.formats.format import TOP_P
from lrq.rounding.metric import Metric, aligned, subspace_size

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it (Frantar et al. 2023, section 3.3): a direction that few samples or none
have seen still counts a little, and H is positive definite whatever its rank."""
KEPT_MEAN = 0.1
"""Share of μμ' that stays in H where a corrected bias takes the mean error away: inputs in use have another mean."""


class UnfitStatisticsError(ValueError):
    """Second moments that no inputs have."""


class Moments:
    """H [K,K] of a layer as its format sees the inputs, scaled so that the mean of its diagonal is 1.

    Where the layer's bias will take the mean error, H is that of what remains: E[xx'] − (1 − :data:`KEPT_MEAN`) μμ'.
    """

    def __init__(self, fmt: Format, stats: InputStats, device: torch.device, bias_corrected: bool = False) -> None:
        self._fmt, self._stats, self._device = fmt, stats, device
        self._taken = 1 - KEPT_MEAN if bias_corrected else 0.0
        self._second = (stats.second.double() - self._taken * stats.mean.double().square()).clamp(min=0)
        mean = self._second.mean().item()
        # Inputs that are all zero say nothing: every error counts alike.
        self._unit = 1 / mean if mean > 0 else 0.0

    @property
    def columns(self) -> int:
        """K."""
        return self._stats.columns

    @property
    def correlated(self) -> bool:
        """Whether more is known than mean and diagonal."""
        return self._stats.gram is not None or self._stats.vectors is not None

    def matrix(self) -> Tensor:
        """H, float32 [K,K]."""
        if self._stats.gram is not None:
            mean = self._stats.mean.double().to(self._device)
            whole = self._stats.gram.to(self._device, torch.float64)
            whole = (whole.addr_(mean, mean, alpha=-self._taken) * self._unit).float()
        else:
            factor, rest = self._factor()
            whole = factor @ factor.mT
            whole.diagonal().add_(rest)
        once = self._fmt.prepare(whole)
        return self._fmt.prepare(once.mT.contiguous()) if once is not whole else whole

    def weights(self) -> Tensor:
        """The diagonal of H with its damping, of inputs that are not rotated, float32 [K]."""
        diagonal = (self._second * self._unit).float() + (DAMPING if self._unit else 1.0)
        return diagonal.to(self._device)

    def _factor(self) -> tuple[Tensor, Tensor]:
        """F [K,r] and d [K], float32, for which H = FF' + diag(d), in the basis of the inputs."""
        stats, device = self._stats, self._device
        mean = stats.mean.to(device).double()
        if stats.vectors is None or stats.values is None:
            factor = (1 - self._taken) ** 0.5 * mean[:, None]
        else:
            vectors, root = stats.vectors.to(device).double(), stats.values.to(device).double().clamp(min=0).sqrt()
            factor = vectors * root
            # With μ = Fa, FF' − tμμ' = F(I − taa')F', whose root is that of the bracket: positive whatever the noise.
            a = torch.where(root > 0, (vectors.mT @ mean) / root, 0.0)
            length = a.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
            left = (1 - self._taken * length.clamp(max=1.0)).sqrt()
            factor.addr_(factor @ a, a * ((1 - left) / length), alpha=-1)
        rest = (self._second.to(device) - factor.square().sum(1)).clamp(min=0)
        return (factor * self._unit**0.5).float(), (rest * self._unit).float()

    def leading(self, count: int) -> tuple[Tensor, Tensor]:
        """V S^(1/2) [K,count at most] of the leading eigenpairs, and what the others have on average, float32 []."""
        if self._stats.gram is None and self._stats.vectors is not None:
            factor, rest = self._factor()
            kept = factor[:, :count]
            rest = rest + factor[:, count:].square().sum(1)
            return self._fmt.prepare(kept.mT.contiguous()).mT, rest.mean()
        values, vectors = torch.linalg.eigh(self.matrix())
        if values[0] < -DAMPING:
            raise UnfitStatisticsError("E[xx'] has a negative eigenvalue")
        values, vectors = values.clamp(min=0), vectors[:, -count:]
        rest = values[:-count].mean() if count < len(values) else values.new_zeros(())
        return vectors * (values[-count:] - rest).clamp(min=0).sqrt(), rest


def moment_metric(moments: Moments, count: int, rounding: Rounding) -> Metric:
    """That of ``count`` matrices by the leading eigenpairs of H: V weighted by the root of the eigenvalue, λ the rest.

    ``top_p`` (of every format 0.4 by default), ``min_k`` and ``max_k`` count directions of the K inputs.
    """
    columns = moments.columns
    size = subspace_size((columns, columns), rounding, TOP_P)
    right, rest = moments.leading(size)
    plain_weight = (rest + DAMPING).expand(count).contiguous()
    return Metric(aligned(right.contiguous()).expand(count, -1, -1), plain_weight, limits_plain=False)


def sequential_metric(h: Tensor, count: int, order: Tensor) -> Metric:
    """``tr(E(H + damping)E')`` for ``count`` matrices, its factor upper triangular in an order of the columns.

    With R upper triangular and H = RR', ``tr(EHE') = |ER|^2``, whose column j has the errors of the columns up to j
    alone. R is the Cholesky factor of H with rows and columns reversed, computed in float64.

    Raises:
        UnfitStatisticsError: H has a negative eigenvalue beyond the damping.
    """
    backwards = order.flip(0)
    damped = h[backwards][:, backwards].double()
    damped.diagonal().add_(DAMPING if h.diagonal().any() else 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        raise UnfitStatisticsError("E[xx'] has a negative eigenvalue")
    triangular = lower.flip(0, 1).float()
    right = torch.empty_like(triangular)
    right[order] = triangular
    none = torch.zeros(count, device=h.device)
    return Metric(right.expand(count, -1, -1), none, order=order, limits_plain=False)


def falling_order(diagonal: Tensor, block: int) -> Tensor:
    """Columns by falling E[x²], int64 [K]: what counts most is rounded first, while all others can make up for it.

    Columns that share a scale, ``block`` of them, stay together: blocks by falling sum, and inside by falling E[x²].
    A last block that is not whole stays the last.
    """
    columns = len(diagonal)
    whole = columns // block * block
    blocks = diagonal[:whole].view(-1, block)
    outer = blocks.sum(1).argsort(descending=True, stable=True)
    inner = blocks.argsort(dim=1, descending=True, stable=True)
    inner = inner + torch.arange(len(blocks), device=diagonal.device)[:, None] * block
    tail = diagonal[whole:].argsort(descending=True, stable=True) + whole
    return torch.cat((inner[outer].flatten(), tail))
