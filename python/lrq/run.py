"""One run, told top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrq.checkpoint.reader import Reader
from lrq.checkpoint.writer import Writer
from lrq.config import Conversion
from lrq.errors import InputError, printable
from lrq.measure import Budget, measure_layers, measures
from lrq.pipeline import LayerResult, OnLayer, run_plan
from lrq.plan import Plan, make_plan
from lrq.report.notices import notices
from lrq.report.verification import LayerReport, Verification, verify_file
from lrq.selection.resolve import resolve

FOREIGN = (".bin", ".ckpt", ".gguf", ".h5", ".json", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth")
"""Endings of files that are not safetensors: a loader would take the output for what it is not."""


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    output: Path
    layers: list[LayerResult]
    kept: dict[str, str]
    """Reason by tensor, for tensors that stay as they are by policy."""
    refused: dict[str, str]
    """Reason by tensor, for weights whose shape the format can't take."""
    notices: list[str]
    """One line each on what a user should know."""
    source_size: int
    output_size: int
    budget: Budget | None = None
    """What --target_bits bought."""


def quantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    conversion: Conversion | None = None,
    device: str | torch.device | None = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_layer: OnLayer = lambda layer: None,
    **settings: Any,
) -> Summary:
    """Convert a safetensors checkpoint.

    Args:
        source: the ``.safetensors`` file.
        output: the file to write; ``<source>-<format>.safetensors`` beside the source if absent. It appears when it is
            whole; a file of that name is replaced.
        conversion: the configuration; ``settings`` change single fields of it.
        device: where to compute, as torch names it; a GPU if there is one.
        on_plan, on_layer: called with the plan before the work, and with every layer when it is written.
        **settings: the flags of the command by name, as in ``quantize(path, nvfp4=True, simple=True)``.

    Returns:
        What was done.

    Raises:
        InputError: bad input or settings; the message is one line. No file is left behind.

    ``quantize("in.safetensors", "out.safetensors", nvfp4=True)`` does what this command does::

        convert_to_quant -i in.safetensors -o out.safetensors --nvfp4
    """
    if settings or conversion is None:
        conversion = Conversion.from_settings({**(conversion or Conversion()).settings(), **resolve(settings)})
    conversion.check()
    chosen = choose_device(device)
    with Reader(source) as reader:
        budget = None
        if measures(conversion):
            conversion, budget = measure_layers(reader, conversion, chosen)
        plan = make_plan(reader, conversion)
        target = default_output(reader.path, plan, conversion) if output is None else _target_of(output)
        _check_target(target, reader.path)
        replaces = target.exists()
        on_plan(plan)
        with Writer(target, plan.header, plan.header_bytes) as writer:
            layers = run_plan(reader, plan, writer, conversion, chosen, on_layer)
        said = notices(plan, conversion)
        if replaces:
            said.append(f"{printable(str(target))}: replaced the file that was there")
        return Summary(target, layers, plan.kept, plan.refused, said, reader.size, plan.output_size, budget)


def default_output(source: Path, plan: Plan, conversion: Conversion) -> Path:
    """``<source>-<format>.safetensors`` beside the source; of a mixed file the target's bits, or what no rule chose."""
    stem = source.stem if source.suffix in (".safetensors", ".sft") else source.name
    if conversion.selection.target_bits is not None:
        return source.with_name(f"{stem}-{conversion.selection.target_bits:g}bits.safetensors")
    usual = next((layer for layer in plan.layers if not layer.why), plan.layers[0])
    return source.with_name(f"{stem}-{usual.format.name}.safetensors")


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on.

    Raises:
        InputError: torch knows no such device, or it is not there.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device}: no such device; choose auto, cpu, cuda, or cuda:N for GPU N") from None
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {device}: {str(error).partition(chr(10))[0]}") from None
    if chosen.type == "meta":
        raise InputError("--device meta: holds no data")
    return chosen


def _target_of(output: str | os.PathLike[str]) -> Path:
    """The file that ``output`` names: behind a link, what it points to."""
    name = os.fspath(output)
    if not name:
        raise InputError("--output: the name is empty; name a file")
    if Path(name).suffix.lower() in FOREIGN:
        raise InputError(f"{name}: lrq writes safetensors; let the name end in .safetensors")
    if name.endswith(os.sep):
        raise InputError(f"{name}: names a folder; name a file")
    return Path(os.path.realpath(name)) if os.path.islink(name) else Path(name)


def _check_target(target: Path, source: Path) -> None:
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder; make it first")
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file")
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: is a device or a pipe; name a file")
    if target.exists() and os.path.samefile(target, source):
        raise InputError(f"{target}: output and input are the same file")
    if target.exists() and not os.access(target, os.W_OK):
        raise InputError(f"{target}: exists and is read-only; name another file")


def verify(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    on_layer: Callable[[LayerReport], None] = lambda layer: None,
) -> Verification:
    """Check a converted file, and measure its error against ``source`` if that is given.

    Returns:
        The layers with their errors, and the checks that failed.

    Raises:
        InputError: one of the files can't be read.
    """
    with Reader(output) as reader:
        if source is None:
            return verify_file(reader, None, on_layer)
        with Reader(source) as original:
            return verify_file(reader, original, on_layer)
