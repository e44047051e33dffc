"""The step of discrete rounding in C++ and CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native.memory import on_cpu, on_cuda, stream_of, with_contiguous_columns
from lrq_kernels.ops.rounding_step import GRIDS, key_of, part_shape


def _run(
    fill: Any,
    weight: Tensor,
    values: Tensor,
    scale: Tensor,
    block_rows: int,
    block_columns: int,
    gradient: Tensor,
    row_curvature: Tensor | None,
    column_curvature: Tensor | None,
    plain_weight: Tensor,
    share: Tensor,
    seed: int,
    step: int,
    grid: str,
    *outputs_and_where: Any,
) -> None:
    rows, columns = weight.shape[-2:]
    numbers = GRIDS[grid]
    fill(
        with_contiguous_columns(weight),
        with_contiguous_columns(values),
        scale.contiguous(),
        min(block_rows, rows),
        min(block_columns, columns),
        with_contiguous_columns(gradient),
        None if row_curvature is None else row_curvature.contiguous(),
        None if column_curvature is None else column_curvature.contiguous(),
        plain_weight.contiguous(),
        share.contiguous(),
        key_of(seed, step),
        (numbers.mantissa, numbers.least_octave, numbers.largest),
        part_shape(columns)[1],
        *outputs_and_where,
    )


@kernel("rounding_step", backend="cpu", accepts=on_cpu)
def rounding_step_cpu(*arguments: Any) -> None:
    _run(_native.rounding_step_cpu, *arguments, torch.get_num_threads())


if _native.has_cuda:

    @kernel("rounding_step", backend="cuda", accepts=on_cuda)
    def rounding_step_cuda(weight: Tensor, *arguments: Any) -> None:
        _run(_native.rounding_step_cuda, weight, *arguments, stream_of(weight))
