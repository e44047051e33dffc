"""``lrq plan`` and ``--dry-run``: what a conversion would do."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
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
from lrq.checkpoint.layout import partial_of
from lrq.checkpoint.reader import Reader
from lrq.cli.batch import expand_new
from lrq.cli.options import given_settings
from lrq.cli.progress import budget_line, model_line, sized
from lrq.cli.tables import console
from lrq.config import Conversion
from lrq.errors import InputError, printable
from lrq.estimate import Estimate, estimate
from lrq.execution import Execution
from lrq.measure import Budget, measure_layers, measures
from lrq.models.patterns import skeleton
from lrq.models.policy import NOT_A_WEIGHT
from lrq.plan import Plan, make_plan
from lrq.report import planned
from lrq.report.notices import notices
from lrq.run import choose_device
from lrq.selection.resolve import resolve

_HARMLESS = ("source", "output", "plan_file", "dry_run", "device", "verbose", "as_json", "measure")


def conversion_of(
    ctx: click.Context, settings: dict[str, Any], sources: Sequence[str], plan_file: str | None
) -> Conversion:
    """The configuration that a command line describes, or a plan file that it names.

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
    with Reader(sources[0]) as reader:
        return planned.read_plan(plan_file, reader)


def dry_run(
    sources: Sequence[str], conversion: Conversion, execution: Execution, device: str, what: str, output: str | None
) -> None:
    """Print the plan of every source, or write the template of a layer-config."""
    names = expand_new(sources)
    if what == "plan":
        for name in names:
            print_plan(name, conversion, execution, device)
        return
    if len(names) > 1:
        raise InputError(f"--dry-run create-template: is of one checkpoint, not of {len(names)}; give one -i")
    source = names[0]
    path = Path(output) if output else Path(source).with_name(f"{Path(source).stem}-layers.json")
    with Reader(source) as reader:
        conversion, _ = _decided(reader, conversion, choose_device(device), False)
        table = planned.template(make_plan(reader, conversion, allow_empty=True))
    if path.exists():
        raise InputError(f"{path}: exists; name another file with -o")
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(spec)}" for key, spec in table.items())
    _write_whole(path, f"{{\n{lines}\n}}\n".encode())
    click.echo(f"{printable(str(path))}: {len(table)} rules; edit them, and give it to --layer-config", err=True)


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
    conversion: Conversion,
    execution: Execution,
    device: str,
    as_json: bool = False,
    verbose: bool = False,
    measure: bool = False,
) -> None:
    """Print what a conversion would do; with ``measure``, after it has read the weights where they decide."""
    chosen = choose_device(device)
    with paused_collection(), Reader(source) as reader:
        conversion, budget = _decided(reader, conversion, chosen, measure)
        plan = make_plan(reader, conversion, allow_empty=True)
        needs = estimate(plan, conversion, execution, chosen)
        if as_json:
            click.echo(json.dumps(planned.document(reader, plan, conversion, needs, budget), indent=1))
            return
        for part in planned.models(plan):
            click.echo(model_line(part["prefix"], part["about"], part["preset"], part["policy"]))
        _print_layers(plan, verbose)
        _say_totals(reader, plan, needs)
    if budget is not None:
        click.echo(budget_line(budget))
    for notice in [*notices(plan, conversion), *([] if measure else _of_measuring(plan, conversion))]:
        click.echo(f"notice: {notice}")


def _decided(
    source: Reader, conversion: Conversion, device: torch.device, measure: bool
) -> tuple[Conversion, Budget | None]:
    """Without weights nothing can be said of --target_bits, and something of --heur and --max_error."""
    if conversion.selection.target_bits is None and not (measure and measures(conversion)):
        return conversion, None
    return measure_layers(source, conversion, device)


def _of_measuring(plan: Plan, conversion: Conversion) -> list[str]:
    if not plan.layers:
        return ["no layer can be quantized: there is nothing to convert"]
    measuring = {"--heur": conversion.selection.heur, "--max_error": conversion.selection.max_error is not None}
    return [
        f"{flag} also measures weights when it converts: layers with too large an error become wider, and add bytes; "
        "--measure does so now"
        for flag, given in measuring.items()
        if given
    ]


def _rows(plan: Plan, verbose: bool) -> list[tuple[str, str, str, str, int]]:
    """Name, becomes, shape, why and count of what is quantized, kept or dropped; alike layers of a kind are one row."""
    rows: Counter[tuple[str, str, str, str]] = Counter()
    for layer in plan.layers:
        why = layer.why + (" full_precision_matrix_mult" if layer.full_precision else "")
        rows[_kind(layer.name, verbose), layer.format.name, _shape(layer.source.shape), why.strip()] += 1
    for entry in plan.copied:
        why = plan.refused.get(entry.name) or plan.kept.get(entry.name, "")
        if why != NOT_A_WEIGHT:
            rows[_kind(entry.name, verbose), entry.dtype, _shape(entry.shape), why] += 1
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


def _say_totals(source: Reader, plan: Plan, needs: Estimate) -> None:
    quantized_bits, bits = planned.bits_per_weight(plan)
    formats = Counter(layer.format.name for layer in plan.layers)
    what = ", ".join(f"{count} layers to {name}" for name, count in formats.items()) or "no layer quantized"
    weights = sum(math.prod(layer.source.shape) for layer in plan.layers)
    click.echo(f"{what}; {weights} weights, {quantized_bits:.2f} bits each with their scales; {bits:.2f} of all")
    click.echo(f"size: {source.size} -> {plan.output_size} bytes ({sized(source.size)} -> {sized(plan.output_size)})")
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
