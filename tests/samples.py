"""One list of inputs for correctness, opcheck and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lrq_kernels.minifloat import encode_e4m3, nearest_e2m1

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 16), (33, 50), (64, 96), (130, 272), (3, 40, 48))
"""Single weights, ragged edges, more than one swizzle tile, a batch."""


def gaussian(*shape: int, seed: int = 0, std: float = 0.02) -> Tensor:
    """Normal weights, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def student(*shape: int, seed: int = 0, freedom: float = 5.0) -> Tensor:
    """Heavy-tailed weights with one column in 64 eight times larger, float32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator)
    chi = torch.stack([torch.randn(*shape, generator=generator).square() for _ in range(int(freedom))]).sum(0)
    w = 0.02 * normal / (chi / freedom).sqrt()
    w[..., ::64] *= 8
    return w


def low_rank(rows: int, columns: int, seed: int = 0) -> Tensor:
    """0.7 L/std(L) + 0.7 N(0,1), L of a quarter of the rank with singular values i^-0.8, a few outlier columns."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns) // 4
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    core = (left * torch.arange(1, rank + 1) ** -0.8) @ right.mT
    w = 0.7 * core / core.std() + 0.7 * torch.randn(rows, columns, generator=generator)
    w[:, ::256] *= 4
    return 0.02 * w


def ties() -> Tensor:
    """Every E2M1 tie and its neighbours at block scale 1/8, with 6 in each block to fix the scale."""
    steps = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    around = torch.cat([steps, steps.nextafter(torch.tensor(9.0)), steps.nextafter(torch.tensor(0.0))])
    rows = torch.stack([around, -around]) / 8
    return torch.cat([rows, torch.tensor([[0.75, -0.0], [-0.75, 0.0]])], 1).repeat(8, 4)


def every_bfloat16() -> Tensor:
    """All finite bfloat16 values; neighbours in magnitude share blocks, so that every scale gets its turn."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    return values[torch.isfinite(values)].view(-1, 128)


def outlier_blocks() -> Tensor:
    """Zero blocks, one-hot blocks, a constant block, a huge outlier beside tiny weights."""
    w = gaussian(32, 64)
    w[0] = 0
    w[1, 16:32] = 0
    w[2, 5], w[3] = 100.0, 0.01
    w[4] = 0
    w[4, 7] = -3.0
    w[5, :16] = 1e-9
    return w


EXTREMES: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(16, 64),
    "negative zeros": lambda: -torch.zeros(16, 64),
    "ties": ties,
    "outlier blocks": outlier_blocks,
    "huge": lambda: gaussian(16, 64, std=1.0).clamp(-3, 3) * 1.1e38,
    "tiny": lambda: gaussian(16, 64, std=1.0) * 1e-37,
    "subnormal": lambda: gaussian(16, 64, std=1.0) * 1e-42,
    "below every scale": lambda: gaussian(16, 64, std=1.0) * 1e-45,
    "powers of two": lambda: torch.exp2(torch.arange(-32.0, 32.0)).repeat(16, 1),
    "just above 448 * 2^k": lambda: (
        (torch.exp2(torch.arange(-8.0, 8.0)) * 448).nextafter(torch.tensor(1e9)).repeat(16, 4)
    ),
}
"""Inputs at the edges of the formats, float32."""


def matrices() -> Iterator[tuple[str, Tensor]]:
    """Every input, named."""
    for shape in SHAPES:
        for dtype in FLOATS:
            yield f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}", gaussian(*shape).to(dtype)
    yield "student", student(64, 128)
    for name, make in EXTREMES.items():
        yield name, make()


MATRICES = dict(matrices())


NEAREST = {
    "e2m1": nearest_e2m1,
    "e4m3": lambda y: encode_e4m3(y).float(),
    "int8": lambda y: y.round().clamp(-127, 127),
}
"""The nearest number of every grid."""


def spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of every weight."""
    scale = scale.repeat_interleave(block[0], -2)[..., : shape[-2], :]
    return scale.repeat_interleave(block[1], -1)[..., : shape[-1]]


def step_arguments(
    weight: Tensor,
    grid: str = "e2m1",
    block: tuple[int, int] = (1, 16),
    gradient: torch.dtype = torch.float32,
    curvatures: tuple[bool, bool] = (True, True),
    plain_weight: float = 0.1,
    share: float = 0.3,
    step: int = 3,
) -> tuple[object, ...]:
    """Arguments of ``rounding_step``: a rounded weight and a gradient of the size of its error."""
    *batch, rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    blocks = (*batch, -(-rows // block[0]), -(-columns // block[1]))
    amax = weight.abs().amax((-2, -1), keepdim=True).float()
    largest = {"e2m1": 6, "e4m3": 448, "int8": 127}[grid]
    scale = (0.5 + torch.rand(blocks, generator=generator)) * amax / largest
    spread_scale = spread(scale, block, weight.shape)
    values = NEAREST[grid](weight.float() / spread_scale.clamp(min=1e-38))
    error = values * spread_scale - weight.float()
    slope = error.abs().mean() * torch.randn(weight.shape, generator=generator)
    curvature = [torch.rand(*batch, n, generator=generator) for n in (rows, columns)]
    return (
        weight,
        values.bfloat16(),
        scale,
        *block,
        slope.to(gradient),
        *(c if has else None for c, has in zip(curvature, curvatures, strict=True)),
        torch.full(batch, plain_weight),
        torch.full(batch, share),
        20,
        step,
        grid,
    )
