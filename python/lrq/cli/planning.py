"""``lrq plan`` and ``--dry-run``: what a conversion would do."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from lrq.checkpoint import disk
from lrq.checkpoint.header import paused_collection
from lrq.checkpoint.layout import Layout, partial_of
from lrq.checkpoint.reader import Reader
from lrq.checkpoint.target import target_of
from lrq.cli.batch import expand_new
from lrq.cli.options import given_settings
from lrq.cli.progress import budget_line, model_line, sized
from lrq.cli.tables import console
from lrq.config import Conversion
from lrq.errors import InputError, counted, printable
from lrq.estimate import Estimate, estimate
from lrq.execution import Execution
from lrq.formats import bfloat16
from lrq.measure import Budget, measure_layers, measures
from lrq.models.patterns import skeleton
from lrq.models.policy import NOT_A_WEIGHT
from lrq.plan import Plan, make_plan, nothing_to_quantize
from lrq.report import planned
from lrq.report.notices import notices
from lrq.run import choose_device, default_output, layout_of
from lrq.selection.decide import Decisions
from lrq.selection.resolve import resolve

_HARMLESS = ("source", "output", "plan_file", "dry_run", "device", "verbose", "as_json", "measure")


@dataclass(frozen=True)
class PlanFile:
    """A file that describes the whole conversion of one checkpoint."""

    path: str

    def read(self, source: Reader) -> tuple[Conversion, Decisions | None]:
        """What it describes; with it the decisions, where they are known."""
        return planned.read_plan(self.path, source)


Wanted = Conversion | PlanFile


def wanted(ctx: click.Context, settings: dict[str, Any], sources: Sequence[str], plan_file: str | None) -> Wanted:
    """What a command line asks for.

    Raises:
        InputError: settings beside a plan file, which has all of them.
    """
    settings = given_settings(ctx, settings)
    if plan_file is None:
        return Conversion.from_settings(resolve(settings))
    given = {name for name in settings if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    given |= {"preset"} if settings["preset"] else set()
    for name in sorted(given - set(_HARMLESS)):
        raise InputError(f"--plan {plan_file}: has all settings; leave --{name} away, or change it in the plan")
    if len(sources) > 1:
        raise InputError(f"--plan {plan_file}: is of one checkpoint, not of {len(sources)}; give one -i")
    return PlanFile(plan_file)


def settled(what: Wanted, source: str) -> Conversion:
    """The configuration, read from the plan file if there is one."""
    if isinstance(what, Conversion):
        return what
    with Reader(source) as reader:
        return what.read(reader)[0]


def dry_run(
    sources: Sequence[str], what: Wanted, execution: Execution, device: str, kind: str, output: str | None
) -> int:
    """Print the plan of every source, or write the template of a layer-config.

    Returns:
        How many of many sources can't be converted.

    Raises:
        InputError: the only one can't be.
    """
    names = expand_new(sources)
    if kind == "create-template":
        if len(names) > 1:
            raise InputError(f"--dry-run create-template: is of one checkpoint, not of {len(names)}; give one -i")
        _write_template(names[0], what, execution, device, output)
        return 0
    failed = 0
    for name in names:
        try:
            print_plan(name, what, execution, device, output=output)
        except InputError as error:
            if len(names) == 1:
                raise
            failed += 1
            click.echo(f"error: {printable(str(error))}", err=True)
    return failed


def _write_template(source: str, what: Wanted, execution: Execution, device: str, output: str | None) -> None:
    path = Path(output) if output else Path(source).with_name(f"{Path(source).stem}-layers.json")
    with Reader(source) as reader:
        conversion, made = (what, None) if isinstance(what, Conversion) else what.read(reader)
        conversion, _ = _decided(reader, conversion, choose_device(device), False, execution.ram_bytes)
        table = planned.template(make_plan(reader, conversion, True, made), reader.entries)
    if path.exists():
        raise InputError(f"{path}: exists; name another file with -o")
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(spec)}" for key, spec in table.items())
    _write_whole(path, f"{{\n{lines}\n}}\n".encode())
    click.echo(f"{printable(str(path))}: {len(table)} rules; edit them, and give it to --layer_config", err=True)


def _write_whole(path: Path, data: bytes) -> None:
    """The file appears when it is whole."""
    partial = partial_of(path)
    try:
        fd = disk.open_to_write(partial, os.O_TRUNC)
        try:
            disk.write_at(fd, memoryview(data), 0)
        finally:
            os.close(fd)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise InputError(f"{path}: can't be written: {error.strerror}") from None
        raise


def print_plan(
    source: str,
    what: Wanted,
    execution: Execution,
    device: str,
    as_json: bool = False,
    verbose: bool = False,
    measure: bool = False,
    output: str | None = None,
) -> None:
    """Print what a conversion would do; with ``measure``, after it has read the weights where they decide.

    Raises:
        InputError: the conversion can't be run; where it has a plan all the same, that is printed first.
    """
    chosen = choose_device(device)
    with paused_collection(), Reader(source) as reader:
        conversion, made = (what, None) if isinstance(what, Conversion) else what.read(reader)
        asked = conversion
        conversion, budget = _decided(reader, conversion, chosen, measure, execution.ram_bytes)
        plan = make_plan(reader, conversion, True, made if conversion is asked else None)
        needs = estimate(plan, conversion, execution, chosen)
        layout = layout_of(_target(reader, plan, conversion, output), plan, execution)
        if as_json:
            click.echo(json.dumps(planned.document(reader, plan, layout, conversion, needs, budget), indent=1))
        else:
            for part in planned.models(plan):
                click.echo(model_line(part["prefix"], part["about"], part["preset"], part["policy"]))
            _print_layers(plan, verbose)
            _say_totals(reader, plan, layout, needs)
            if budget is not None:
                click.echo(budget_line(budget))
            for notice in [*notices(plan, conversion), *([] if measure else _of_measuring(plan, conversion))]:
                click.echo(f"notice: {notice}")
        if not plan.layers:
            raise nothing_to_quantize(reader, plan, conversion)


def _target(source: Reader, plan: Plan, conversion: Conversion, output: str | None) -> Path:
    """The name of the output, which stands in the index of its shards."""
    if output is not None and not os.path.isdir(output):
        return target_of(output)
    return default_output(source.stem, plan, conversion) if plan.layers else source.stem


def _decided(
    source: Reader, conversion: Conversion, device: torch.device, measure: bool, limit: int | None
) -> tuple[Conversion, Budget | None]:
    """Without weights nothing can be said of --target_bits, and something of --heur and --max_error."""
    if conversion.selection.target_bits is None and not (measure and measures(conversion)):
        return conversion, None
    return measure_layers(source, conversion, device, limit)


_MEASURED = {
    "heur": "layers whose error is out of line stay as they are",
    "max_error": "layers with too large an error become wider",
}


def _of_measuring(plan: Plan, conversion: Conversion) -> list[str]:
    """What the weights may still change, where they were not read, and no rule decides on all layers."""
    selection = conversion.selection
    if selection.target_bits is not None or all(layer.asked for layer in plan.layers):
        return []
    return [
        f"--{flag} also measures weights when it converts: {what}, and add bytes; lrq plan --measure does so now"
        for flag, what in _MEASURED.items()
        if getattr(selection, flag) not in (False, None)
    ]


def _rows(plan: Plan, verbose: bool) -> list[tuple[str, str, str, str, int]]:
    """Name, becomes, shape, why and count of what is quantized, kept or dropped; alike layers of a kind are one row."""
    rows: Counter[tuple[str, str, str, str]] = Counter()
    for layer in plan.layers:
        why = layer.why + (" full_precision_matrix_mult" if layer.full_precision else "")
        rows[_kind(layer.name, verbose), layer.format.name, _shape(layer.source.shape), why.strip()] += 1
    for entry in plan.copied:
        halved = plan.bfloat16.get(entry.name)
        why = halved or plan.refused.get(entry.name) or plan.kept.get(entry.name, "")
        if why != NOT_A_WEIGHT:
            becomes = entry.dtype if halved is None else bfloat16.NAME
            rows[_kind(entry.name, verbose), becomes, _shape(entry.shape), why] += 1
    for entry in plan.dropped:
        rows[_kind(entry.name, verbose), "left out", _shape(entry.shape), plan.why_dropped[entry.name]] += 1
    return [(*row, count) for row, count in rows.items()]


def _kind(name: str, verbose: bool) -> str:
    name = name.removesuffix(".weight")
    return name if verbose else skeleton(name).replace("#", "N")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _print_layers(plan: Plan, verbose: bool) -> None:
    table = Table("layer", "count", "shape", "becomes", "why", box=SIMPLE)
    for name, becomes, shape, why, count in _rows(plan, verbose):
        table.add_row(Text(printable(name), overflow="fold"), str(count), shape, becomes, Text(printable(why)))
    console().print(table)


def _say_totals(source: Reader, plan: Plan, layout: Layout, needs: Estimate) -> None:
    quantized_bits, bits = planned.bits_per_weight(plan)
    formats = planned.formats(plan).items() if plan.layers else ()
    what = ", ".join(f"{counted(count, 'layer')} to {name}" for name, count in formats) or "no layer quantized"
    weights = sum(math.prod(layer.source.shape) for layer in plan.layers)
    click.echo(f"{what}; {weights} weights, {quantized_bits:.2f} bits each with their scales; {bits:.2f} of all")
    shards = "" if layout.index is None else f"; {len(layout.files)} files and an index of {len(layout.index)} bytes"
    click.echo(f"size: {source.size} -> {layout.size} bytes ({sized(source.size)} -> {sized(layout.size)}){shards}")
    slow = planned.slow_layers(plan)
    reasons = Counter(slow.values())
    but = "".join(f"; {count} not: {why}" for why, count in reasons.most_common(3))
    click.echo(f"low-precision matmul in ComfyUI: {len(plan.layers) - len(slow)} of {len(plan.layers)} layers{but}")
    gpu = f", GPU {sized(needs.gpu_bytes)}" if needs.gpu_bytes else ""
    click.echo(
        f"peak memory about {sized(needs.host_bytes)}{gpu}; time about {_duration(needs.seconds)} on this machine"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
