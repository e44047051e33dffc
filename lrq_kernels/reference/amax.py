from torch import Tensor

from lrq_kernels.dispatch import kernel


@kernel("amax", backend="reference")
def amax(x: Tensor, out: Tensor) -> None:
    out.copy_(x.abs().amax((-2, -1)))
