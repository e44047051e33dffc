"""One input or many: what fails is said, and the others go on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from lrq.checkpoint.sources import expand, find_source
from lrq.cli.progress import Progress
from lrq.config import Conversion
from lrq.errors import InputError, printable
from lrq.execution import Execution


def convert_all(
    names: Sequence[str],
    output: str | None,
    conversion: Conversion,
    execution: Execution,
    device: str,
    verbose: bool,
) -> int:
    """Convert every input; the number of those that failed, where there are many.

    Raises:
        InputError: the only input failed, or the output can't hold many.
    """
    sources = expand(names)
    if len(sources) == 1:
        _convert(sources[0], output, None, conversion, execution, device, verbose)
        return 0
    if output is not None and not os.path.isdir(output):
        raise InputError(f"{printable(output)}: must be a folder that is there: {len(sources)} inputs are converted")
    failures = []
    names_taken: dict[str, str] = {}
    for source in sources:
        try:
            if output is not None:
                other = names_taken.setdefault(find_source(source).stem.name, source)
                if other != source:
                    raise InputError(f"{source}: its output would be named as that of {other}; convert it by itself")
            _convert(source, None, output, conversion, execution, device, verbose)
        except InputError as error:
            failures.append(source)
            click.echo(f"error: {printable(str(error))}", err=True)
    done = f"{len(sources) - len(failures)} of {len(sources)} inputs converted"
    failed = f"; failed: {', '.join(map(printable, failures))}" if failures else ""
    click.echo(done + failed, err=True)
    return len(failures)


def _convert(
    source: str,
    output: str | None,
    folder: str | None,
    conversion: Conversion,
    execution: Execution,
    device: str,
    verbose: bool,
) -> None:
    from lrq.run import quantize

    with Progress(verbose) as progress:
        summary = quantize(
            source,
            output,
            folder=folder,
            conversion=conversion,
            device=device,
            on_plan=progress.on_plan,
            on_layer=progress.on_layer,
            execution=execution,
        )
    progress.summarise(summary)
