"""Reports for people (rich tables) and programs (JSON)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import HEAVY_HEAD, SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrq.errors import counted, printable

if TYPE_CHECKING:
    from lrq.report.calibrated import Predicted
    from lrq.report.error import LayerError
    from lrq.report.verification import LayerReport, Verification

_COLUMNS = {
    "error": ("frobenius", "{:.4f}"),
    "projected": ("projected_error", "{:.4f}"),
    "SQNR dB": ("sqnr", "{:.1f}"),
    "error / nearest": ("frobenius_ratio", "{:.3f}"),
    "projected / nearest": ("projected_ratio", "{:.3f}"),
}
_PREDICTED = ("outputs: nearest", "outputs", "bias shift")
_LEGEND = (
    "error: |E|/|W|; projected: along the weight's leading directions; nearest: round-to-nearest in the same format"
)
_LEGEND_OF_OUTPUTS = (
    "\noutputs: the error of the layer's outputs that the statistics predict; where it is made small, error rises"
)
_MOST_FAILURES = 20
_NARROW = 130
"""Narrower terminals leave columns away, so that the names of layers stay whole."""
_ENOUGH = 200
"""Width of tables that are piped into a file: nothing is cut."""


def console() -> Console:
    """The terminal; for a pipe or a file wide enough that nothing is cut."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=_ENOUGH)


def _numbers(error: LayerError | None) -> list[str]:
    if error is None:
        return ["-"] * len(_COLUMNS)
    return [pattern.format(getattr(error, name)) for name, pattern in _COLUMNS.values()]


def _outputs(predicted: Predicted | None) -> list[str]:
    if predicted is None:
        return ["-"] * len(_PREDICTED)
    error = predicted.error
    return [f"{error.of_nearest:.4f}", f"{predicted.left:.4f}", f"{error.shift:.4f}" if predicted.corrected else "-"]


def _outputs_of_all(result: Verification) -> list[str]:
    """The same of all layers with statistics together."""
    errors = [layer.predicted for layer in result.layers if layer.predicted is not None]
    signal = sum(one.error.signal for one in errors)
    if not signal > 0:
        return ["-"] * len(_PREDICTED)
    left = sum(one.error.noise - (one.error.mean if one.corrected else 0.0) for one in errors)
    nearest = sum(one.error.nearest for one in errors)
    return [f"{math.sqrt(max(noise, 0.0) / signal):.4f}" for noise in (nearest, left)] + [""]


def _inputs(predicted: Predicted | None) -> dict[str, object]:
    """For JSON: which statistics, and what they predict of the outputs."""
    if predicted is None:
        return {}
    error = predicted.error
    found = {"output_error_of_nearest": error.of_nearest, "output_error_of_codes": error.before}
    found |= {"output_error": predicted.left, **({"bias_shift": error.shift} if predicted.corrected else {})}
    return {"inputs": {"statistics": predicted.statistics, **found}}


def _finite(error: LayerError | None) -> dict[str, float | None] | None:
    """JSON has no infinity: null."""
    if error is None:
        return None
    values = {name: getattr(error, name) for name, _ in _COLUMNS.values()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


@contextmanager
def verifying() -> Iterator[Callable[[LayerReport], None]]:
    """Says on a terminal how far it is: the exact directions of a large layer take a while."""
    terminal, done = Console(stderr=True), count(1)
    with terminal.status("verifying") if terminal.is_terminal else nullcontext() as status:
        yield lambda layer: None if status is None else status.update(f"verified {next(done)}: {printable(layer.name)}")


def print_verification(result: Verification, path: Path, as_json: bool) -> None:
    """The table of ``lrq verify``; failed checks go to stderr as well as into the JSON."""
    if as_json:
        layers = [
            {"name": layer.name, "format": layer.format, "shape": layer.shape, "error": _finite(layer.error)}
            | _inputs(layer.predicted)
            for layer in result.layers
        ]
        document: dict[str, Any] = {"file": str(path), "ok": result.ok, "failures": result.failures}
        document |= {"unchanged_tensors": result.unchanged, "bfloat16_tensors": result.bfloat16}
        document |= {"total": _finite(result.total), "layers": layers}
        click.echo(json.dumps(document, indent=2))
    else:
        _print_table(result)
    for failure in result.failures[:_MOST_FAILURES]:
        click.echo(f"failed: {printable(failure)}", err=True)
    if len(result.failures) > _MOST_FAILURES:
        click.echo(f"... and {len(result.failures) - _MOST_FAILURES} more (--json lists all)", err=True)
    if not as_json:
        failed = f"{counted(len(result.failures), 'check')} failed"
        compared = "" if result.total is not None or not result.ok else " (compared with nothing; --source IN measures)"
        click.echo(f"{printable(str(path))}: {'ok' if result.ok else failed}{compared}")


def _print_table(result: Verification) -> None:
    terminal = console()
    measured = result.total is not None
    narrow = terminal.width < _NARROW
    headers = {name: name.replace(" / ", " /\n") for name in _COLUMNS}
    predicted = _PREDICTED if any(layer.predicted for layer in result.layers) else ()
    table = Table("layer", "format", "shape", *headers.values(), *predicted, box=SIMPLE if narrow else HEAVY_HEAD)
    for column in table.columns[3:]:
        column.justify = "right"
    for layer in result.layers:
        shape = " x ".join(map(str, layer.shape))
        outputs = _outputs(layer.predicted) if predicted else []
        table.add_row(Text(printable(layer.name)), layer.format, shape, *_numbers(layer.error), *outputs)
    table.add_section()
    table.add_row(
        counted(len(result.layers), "layer"),
        "",
        "",
        *_numbers(result.total),
        *_outputs_of_all(result)[: len(predicted)],
    )
    dropped = {1, 2} if narrow else set()
    dropped |= set() if measured else set(range(3, 3 + len(_COLUMNS)))
    table.columns = [column for i, column in enumerate(table.columns) if i not in dropped]
    table.columns[0].overflow = "fold"
    terminal.print(table)
    if measured:
        click.echo(_LEGEND + (_LEGEND_OF_OUTPUTS if predicted else ""))
        rounded = f", {result.bfloat16} rounded to bfloat16" if result.bfloat16 else ""
        click.echo(f"{counted(result.unchanged, 'tensor')} unchanged{rounded}")


def print_backends(as_json: bool) -> None:
    """The table of ``lrq backends``."""
    from lrq_kernels.dispatch import BACKENDS, backends, forced_backend

    forced_backend()
    found = backends()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = Table("operation", *BACKENDS)
    for operation, kernels in found.items():
        table.add_row(operation, *(kernels[backend] for backend in BACKENDS))
    console().print(table)
