"""Every Triton kernel compiles for absent GPUs as it is launched, spills nothing and computes nothing inexactly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_triton import compiled, compiles, resource_usage

COLUMNS = (3072, 5120, 14336)
ROTATED = tuple((columns, group) for columns in (1024, 4096) for group in (16, 64, 256, 1024))
STEPS = {
    "values": "*bf16",
    "gradient": "*fp32",
    "row_curvature": "*fp32",
    "column_curvature": "*fp32",
    "plain_weight": "*fp32",
    "share": "*fp32",
    "out": "*bf16",
    "errors": "*bf16",
    "sums": "*fp32",
}
TENSORS = ("x", "codes", "out", "packed", "linear", "tiles", "scales", *STEPS)
MULTIPLES = frozenset((*TENSORS, "batch_stride", "row_stride", "columns", "region_columns"))


def amax_and_matrices() -> Iterator[tuple[str, str, str, dict[str, str], dict[str, Any]]]:
    tile = {"ROWS": 2, "COLUMNS": 4096, "num_warps": 8}
    yield "amax", "amax", "amax_kernel", {"bits": "*i32"}, tile
    for fp8 in (True, False):
        kinds = {"FP8": fp8, "FUSED": True, "HARDWARE": True}
        for given in (True, False):
            source = {"source": "*fp32" if given else "*i32"}
            yield f"matrix {fp8} {given}", "scaled", "matrix_kernel", source, tile | kinds | {"GIVEN": given}
        yield f"region {fp8}", "scaled", "region_kernel", {}, {"ROWS": 32, "COLUMNS": 256, "num_warps": 8} | kinds
        for dtype in ("bf16", "fp32"):
            out = {"out": f"*{dtype}"}
            values = tile | {"BY_ROW": True, "FP8": fp8, "HARDWARE": True}
            yield f"values {fp8} {dtype}", "unscaled", "values_kernel", out, values


def held() -> Iterator[tuple[str, str, str, dict[str, str], dict[str, Any]]]:
    from lrq_kernels.triton.rotated_rows import rotated_rows_config
    from lrq_kernels.triton.scaled import blocks_config, rows_config
    from lrq_kernels.triton.unscaled import pieces_config

    kinds = {"FUSED": True, "HARDWARE": True}
    for columns in (*COLUMNS, 256):
        yield f"rows {columns}", "scaled", "rows_kernel", {}, rows_config(columns) | kinds | {"FP8": True}
    yield "rows int8", "scaled", "rows_kernel", {}, rows_config(5120) | kinds | {"FP8": False}
    for columns, group in (*ROTATED, (5120, 256), (14336, 64), (20480, 16), (3072, 1024), (512, 4)):
        config = rotated_rows_config(columns, group) | {"FUSED": True}
        yield f"rotated rows {columns} {group}", "rotated_rows", "rotated_rows_kernel", {}, config
    for block in (128, 32, 10):
        yield f"blocks {block}", "scaled", "blocks_kernel", {}, blocks_config(block, 40) | kinds | {"FP8": True}
        pieces = pieces_config(block, 40) | {"FP8": True, "HARDWARE": True}
        yield f"pieces {block}", "unscaled", "pieces_kernel", {"out": "*bf16"}, pieces


def others() -> Iterator[tuple[str, str, str, dict[str, str], dict[str, Any]]]:
    for group in (4, 16, 64, 256, 1024):
        config = {"ROWS": 1, "COLUMNS": 4096, "GROUP": group, "num_warps": 4}
        yield f"rotate {group}", "hadamard", "rotate_kernel", {"out": "*fp32"}, config
    table = {"outer_source": "*i32", "table": "*i32", "coherence": "fp32"}
    yield "table", "sieve", "table_kernel", table, {"GIVEN": False, "PART": 128, "num_warps": 4}
    words = {"ROWS": 2, "COLUMNS": 512, "WORDS": True, "HIGH_FIRST": True, "num_warps": 8}
    yield "pack", "fp4", "pack_kernel", {"codes": "*i64", "out": "*i32"}, words
    yield "unpack", "fp4", "unpack_kernel", {"packed": "*i32", "out": "*i64"}, words
    for forth in (True, False):
        config = {"ASIDE": 16, "BYTES": 1, "FORTH": forth, "num_warps": 4}
        yield f"swizzle {forth}", "swizzle", "swizzle_kernel", {"linear": "*i32", "tiles": "*i32"}, config


def steps() -> Iterator[tuple[str, str, str, dict[str, str], dict[str, Any]]]:
    from lrq_kernels.ops.rounding_step import GRIDS, part_shape

    for name, grid in GRIDS.items():
        rows, columns = part_shape(3072)
        shared = 1 if name == "int8" else 8
        numbers = {"MANTISSA": grid.mantissa, "LEAST_OCTAVE": grid.least_octave, "LARGEST": grid.largest}
        config = {"ROWS": rows, "COLUMNS": columns, "SHARED": shared, "num_warps": 4} | numbers
        yield f"step {name}", "rounding_step", "step_kernel", STEPS | {"key": "i32"}, config


def every() -> list[tuple[str, str, str, dict[str, str], dict[str, Any]]]:
    return [*amax_and_matrices(), *held(), *others(), *steps()]


def for_absent(architecture: int, case, dtype: str = "bf16", ones: bool = False):
    """A kernel as launched on ``architecture``."""
    import importlib

    _, module, kernel, pointers, constants = case
    constants = dict(constants)
    warps = constants.pop("num_warps")
    types = {"x": f"*{dtype}", "codes": "*u8", "scales": "*fp32"} | pointers
    function = getattr(importlib.import_module(f"lrq_kernels.triton.{module}"), kernel)
    return compiled(function, architecture, types, constants, ones, warps, MULTIPLES)


@compiles
@pytest.mark.parametrize("architecture", [90, 100, 120])
def test_compiles_without_a_gpu(architecture: int, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for case in every():
        kernel = for_absent(architecture, case)
        ptx = kernel.asm["ptx"]
        inexact = set(re.findall(r"div\.full\S*|\S+\.approx\S*|\S+\.ftz\S*", ptx))
        # What the correctly rounded reciprocal starts from.
        assert inexact <= ({"rcp.approx.ftz.f32"} if case[0] == "table" else set()), case[0]
        usage = resource_usage(kernel, tmp_path)
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, f"{case[0]}: {usage}"
        # 16 bytes at once.
        assert re.search(r"ld\.global\.v(4\.b32|2\.b64)", ptx) or case[0].endswith((" 10", "table")), case[0]


@compiles
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_compiles_every_specialization(dtype: str, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for case in every():
        for_absent(120, case, dtype, ones=True)


@compiles
def test_compiles_without_e4m3(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for case in every():
        if case[4].get("FP8"):
            for_absent(80, (*case[:4], case[4] | {"HARDWARE": False}))
