"""One input or many: what fails is said, and the others go on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from lrq.checkpoint.sources import expand, find_source, is_glob, made_by_lrq
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
    sources = expand_new(names)
    in_folder = output is not None and os.path.isdir(output)
    if len(sources) == 1:
        to_folder = in_folder and (len(names) > 1 or is_glob(names[0]))
        file, folder = (None, output) if to_folder else (output, None)
        _convert(sources[0], file, folder, conversion, execution, device, verbose)
        return 0
    if output is not None and not in_folder:
        raise InputError(f"{printable(output)}: must be a folder that is there: {len(sources)} inputs are converted")
    failures = []
    names_taken: dict[str, str] = {}
    for source in sources:
        try:
            stem = find_source(source).stem
            other = names_taken.setdefault(os.path.abspath(stem) if output is None else stem.name, source)
            if other != source:
                raise InputError(f"{source}: its output would be named as that of {other}; convert it by itself")
            _convert(source, None, output, conversion, execution, device, verbose)
        except BrokenPipeError:
            raise
        except (InputError, OSError) as error:
            failures.append(source)
            said = error if isinstance(error, InputError) else f"{source}: {error.strerror or error}"
            click.echo(f"error: {printable(str(said))}", err=True)
    done = f"{len(sources) - len(failures)} of {len(sources)} inputs converted"
    failed = f"; failed: {', '.join(map(printable, failures))}" if failures else ""
    click.echo(done + failed, err=True)
    return len(failures)


def expand_new(names: Sequence[str]) -> list[str]:
    """The checkpoints that names and globs stand for, without those that only a glob finds and that lrq made.

    Raises:
        InputError: a glob that finds nothing, or nothing else.
    """
    sources = expand(names)
    by_name = {os.path.abspath(name) for name in names if not is_glob(name)}
    made = {name for name in sources if os.path.abspath(name) not in by_name and made_by_lrq(name)}
    if made and len(made) == len(sources):
        raise InputError(f"{', '.join(names)}: finds only files that lrq made; to convert one again, name it")
    for name in sorted(made):
        click.echo(f"notice: {printable(name)}: skipped, lrq made it; to convert it again, name it", err=True)
    return [name for name in sources if name not in made]


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
