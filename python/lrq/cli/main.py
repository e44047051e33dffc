"""The commands. Only this floor prints."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from lrq.cli.calibrating import actscale, calibrate
from lrq.cli.options import DashCommand, OneLineGroup, configuration_options, execution_options
from lrq.errors import InputError, printable
from lrq.execution import Execution
from lrq_kernels._version import __version__

BAD_INPUT = 2
INTERRUPTED = 130
_NO_MEMORY = ("can't allocate memory", "can't start new thread")
"""How torch and Python say so."""
_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    click.echo(f"error: {printable(message)}", err=True)
    raise SystemExit(code)


def _stop(*_: Any) -> NoReturn:
    # A second signal must not stop the removal of what was written.
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _leave(*_: Any) -> NoReturn:
    # At once: what an exception would end may be an import, which can swallow it.
    os.write(2, b"error: interrupted; nothing was written\n")
    os._exit(INTERRUPTED)


def guarded(work: Callable[[], Any]) -> Any:
    """Run ``work``; what a user can cause becomes one line on stderr."""
    # What is ignored stays so: nohup ignores SIGHUP.
    heeded = [number for number in _STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    handlers = {number: signal.signal(number, _leave) for number in heeded}
    import lrq.run  # noqa: F401

    for number in heeded:
        signal.signal(number, _stop)
    try:
        return work()
    except InputError as error:
        _fail(str(error))
    except KeyboardInterrupt as stop:
        _fail(f"interrupted; {stop.args[0] if stop.args else 'nothing was written'}", INTERRUPTED)
    except BrokenPipeError:
        raise SystemExit(1) from None
    except MemoryError:
        _fail("out of memory; close other programs or use a machine with more")
    except RuntimeError as error:
        if any(words in str(error) for words in _NO_MEMORY):
            _fail("out of memory; close other programs, or take less by --max_ram, --low_memory or --simple")
        # By name: importing the class would import torch.
        if type(error).__name__ != "BackendError":
            raise
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@click.group(cls=OneLineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lrq")
def main() -> None:
    """Turn safetensors checkpoints into FP8, INT8, NVFP4 or MXFP8 files that ComfyUI loads."""


@click.command(cls=DashCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-i",
    "--input",
    "sources",
    required=True,
    multiple=True,
    metavar="FILE",
    help="The checkpoint: .safetensors, index.json, folder or glob; may be given many times.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="The file to write; replaces one of this name when it is whole [default: <input>-<format>.safetensors]; a "
    "folder, if there are many inputs.",
)
@configuration_options
@click.option("--plan", "plan_file", metavar="FILE", help="Do what a plan says (lrq plan IN --json > FILE).")
@click.option(
    "--dry-run",
    is_flag=False,
    flag_value="plan",
    type=click.Choice(["plan", "create-template"]),
    help="Plan only; create-template writes a --layer_config to edit.",
)
@execution_options
@click.option("--device", default="auto", show_default=True, help="Where to compute: auto, cpu, cuda, cuda:1, ...")
@click.option("--verbose", is_flag=True, help="Say of every tensor what becomes of it, and why.")
@click.version_option(__version__, prog_name="lrq")
def convert_to_quant(
    sources: tuple[str, ...],
    output: str | None,
    plan_file: str | None,
    dry_run: str | None,
    device: str,
    verbose: bool,
    **settings: Any,
) -> None:
    """Convert a checkpoint: linear layers to a low-precision format, the rest bit for bit.

    \b
    Example:
      convert_to_quant -i model.safetensors --nvfp4 --comfy_quant
    """

    def work() -> int:
        from lrq.cli import planning
        from lrq.cli.batch import convert_all

        execution = Execution.from_settings(settings)
        wanted = planning.wanted(click.get_current_context(), settings, sources, plan_file)
        if dry_run is not None:
            return planning.dry_run(sources, wanted, execution, device, dry_run, output)
        return convert_all(sources, output, planning.settled(wanted, sources[0]), execution, device, verbose)

    failed = guarded(work)
    if failed:
        raise SystemExit(BAD_INPUT)


@main.command(cls=DashCommand)
@click.argument("source", metavar="IN")
@configuration_options
@execution_options
@click.option("--device", default="auto", show_default=True, help="Where it would be computed.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON; lrq convert --plan takes it.")
@click.option("--verbose", is_flag=True, help="Say of every layer what becomes of it, not of every kind of layer.")
@click.option("--measure", is_flag=True, help="Read the weights, too, for what --heur and --max_error measure.")
def plan(source: str, device: str, as_json: bool, verbose: bool, measure: bool, **settings: Any) -> None:
    """Say what a conversion would do, from the header alone: layers, bytes, memory, time. Options as of convert.

    --target_bits reads the weights.

    \b
    Example:
      lrq plan model.safetensors --nvfp4
    """

    def work() -> None:
        from lrq.cli import planning

        execution = Execution.from_settings(settings)
        wanted = planning.wanted(click.get_current_context(), settings, (source,), None)
        planning.print_plan(source, wanted, execution, device, as_json, verbose, measure)

    guarded(work)


main.add_command(convert_to_quant, "convert")
main.add_command(calibrate)
main.add_command(actscale)


@main.command(cls=DashCommand)
@click.argument("output", metavar="OUT")
@click.argument("more", nargs=-1, metavar="")
@click.option("--source", metavar="IN", help="The checkpoint it was made from: compares and measures.")
@click.option("--calib", metavar="FILE", help="Statistics of the inputs: adds the error of outputs that they predict.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(output: str, more: tuple[str, ...], source: str | None, calib: str | None, as_json: bool) -> None:
    """Check a converted file: names, shapes, markers, padding, finiteness, unchanged tensors, and what error remains.

    Exit code 1 if a check fails.
    """
    from lrq.cli import tables

    if more:
        _fail(f"{more[0]}: verify takes one file; the checkpoint it was made from is --source {more[0]}")

    def work() -> bool:
        from lrq.run import verify as verify_file

        with tables.verifying() as on_layer:
            result = verify_file(output, source, calib=calib, on_layer=on_layer)
        tables.print_verification(result, Path(output), as_json)
        return result.ok

    if not guarded(work):
        raise SystemExit(1)


@main.command(cls=DashCommand)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def backends(as_json: bool) -> None:
    """Which backend has a kernel for which operation on this machine, and why not where one is missing."""
    from lrq.cli import tables

    guarded(lambda: tables.print_backends(as_json))


if __name__ == "__main__":
    sys.exit(main())
