"""One run, told top to bottom."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrq.calibration.stats import load_stats
from lrq.checkpoint.journal import Fingerprint
from lrq.checkpoint.layout import Layout, Tensor, in_shards, one_file
from lrq.checkpoint.reader import Reader
from lrq.checkpoint.target import check_targets, remains, target_of
from lrq.checkpoint.writer import Writer
from lrq.config import Conversion
from lrq.dialects import comfyui
from lrq.errors import InputError, UnfinishedError, counted, printable
from lrq.execution import Execution
from lrq.formats import bfloat16
from lrq.measure import Budget, measure_layers, measures
from lrq.pipeline import LayerResult, OnLayer, run_plan
from lrq.plan import Plan, make_plan
from lrq.report.notices import notices
from lrq.report.verification import LayerReport, Verification, verify_file
from lrq.selection.inputs import FILES
from lrq.selection.resolve import resolve
from lrq.staging.memory import MemoryPlan, plan_memory
from lrq.staging.process import give_back_workspaces, peak
from lrq_kernels._version import __version__
from lrq_kernels.dispatch import forced_backend


@dataclass(frozen=True)
class MemoryUse:
    """Peak memory in bytes, as predicted and as measured; of the GPU 0 if there is none."""

    predicted: int
    measured: int
    predicted_vram: int
    measured_vram: int


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    output: Path
    layers: list[LayerResult]
    kept: dict[str, str]
    """Reason by tensor, for tensors that stay as they are by policy."""
    refused: dict[str, str]
    """Reason by tensor, for weights whose shape the format can't take."""
    bfloat16: dict[str, str]
    """Reason by tensor, for weights that are not quantized, but stored in bfloat16."""
    notices: list[str]
    """One line each on what a user should know."""
    source_size: int
    output_size: int
    memory: MemoryUse
    budget: Budget | None = None
    """What --target_bits bought."""

    @property
    def formats(self) -> Counter[str]:
        """Layers by format, those in bfloat16 as well."""
        return Counter(layer.format for layer in self.layers) + Counter({bfloat16.NAME: len(self.bfloat16)})


def quantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    conversion: Conversion | None = None,
    device: str | torch.device | None = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_layer: OnLayer = lambda layer: None,
    execution: Execution | None = None,
    **settings: Any,
) -> Summary:
    """Convert a safetensors checkpoint.

    Args:
        source: a ``.safetensors`` file, an index of shards, a folder or a glob.
        output: the file to write; ``<source>-<format>.safetensors`` beside the source if absent. It appears when it is
            whole; a file of that name is replaced. What a stopped run has done lies in ``<output>.partial``; the same
            call goes on from there.
        folder: where the output goes if it is not named; beside the source if absent.
        conversion: the configuration; ``settings`` change single fields of it.
        device: where to compute, as torch names it; a GPU if there is one.
        execution: memory, shards and what becomes of an unfinished run; without it, fields among ``settings`` count.
        on_plan, on_layer: called with the plan before the work, and with every layer when it is written.
        **settings: the flags of the command by name, as in ``quantize(path, nvfp4=True, simple=True)``.

    Returns:
        What was done.

    Raises:
        InputError: bad input or settings; the message is one line. No file is left behind.
        UnfinishedError: the disk failed, or memory; what was written is kept for the next call.

    ``quantize("in.safetensors", "out.safetensors", nvfp4=True)`` does what this command does::

        convert_to_quant -i in.safetensors -o out.safetensors --nvfp4
    """
    execution = execution or Execution.from_settings(settings)
    execution.check()
    if settings or conversion is None:
        conversion = Conversion.from_settings({**(conversion or Conversion()).settings(), **resolve(settings)})
    conversion.check()
    chosen = choose_device(device)
    if chosen.type == "cuda":
        if execution.max_vram is not None:
            # What other work of this process left there is not counted in the bound.
            give_back_workspaces(chosen)
        torch.cuda.reset_peak_memory_stats(chosen)
    with Reader(source) as reader:
        budget = None
        if measures(conversion):
            conversion, budget = measure_layers(reader, conversion, chosen, execution.ram_bytes)
        plan = make_plan(reader, conversion)
        stem = reader.stem if folder is None else Path(folder) / reader.stem.name
        layout = layout_of(
            default_output(stem, plan, conversion) if output is None else target_of(output), plan, execution
        )
        used_files = (
            conversion.calibration.calib,
            conversion.calibration.actcal_lora,
            conversion.calibration.input_scales,
        )
        check_targets({layout.target, *(file.path for file in layout.files)}, (*reader.files, *used_files))
        replaces = [path for path in (layout.target, *(file.path for file in layout.files)) if path.exists()]
        old = remains(layout, (*reader.files, *used_files))
        memory = plan_memory(plan.layers, conversion.rounding, chosen, execution)
        on_plan(plan)
        layers = _write(reader, plan, layout, conversion, chosen, on_layer, execution, memory)
        said = notices(plan, conversion)
        if replaces:
            said.append(f"{printable(str(replaces[0]))}: replaced the file that was there")
        for path in old:
            path.unlink(missing_ok=True)
        if old:
            said.append(
                f"{printable(str(old[0]))}: removed, the output was in {counted(len(old), 'other file')} before"
            )
        said += _larger(layout, execution)
        if memory.plain and forced_backend() is None:
            said.append("no kernels: PyTorch did it all, many times slower; lrq backends says why there are none")
        used = MemoryUse(memory.host, peak(), memory.vram, _peak_vram(chosen))
        stay = plan.kept, plan.refused, plan.bfloat16
        return Summary(layout.target, layers, *stay, said, reader.size, layout.size, used, budget)


def _larger(layout: Layout, execution: Execution) -> list[str]:
    """A notice where a file had to be larger than --shard_size."""
    limit = execution.shard_bytes
    over = [file for file in layout.files if limit is not None and file.size > limit]
    if not over:
        return []
    return [f"--shard_size: {counted(len(over), 'file')} larger, as one layer or tensor with its header is"]


def layout_of(path: Path, plan: Plan, execution: Execution) -> Layout:
    """The files that a planned output is made of, where ``path`` is its name if it is one file."""
    if execution.shard_bytes is None:
        return one_file(path, plan.header, plan.header_bytes)
    kinds = {entry.name: (entry.name, entry.dtype, entry.shape) for entry in plan.header.entries}
    groups: dict[int, list[Tensor]] = {entry.begin: [kinds.pop(entry.name)] for entry in plan.copied if entry.size}
    for layer in plan.layers:
        names = [f"{layer.name}.{suffix}" for suffix in comfyui.WRITTEN]
        groups[layer.source.begin] = [kinds.pop(name) for name in names if name in kinds]
    ordered = [list(kinds.values()), *(groups[begin] for begin in sorted(groups))]
    layout = in_shards(path, ordered, plan.header.metadata, execution.shard_bytes)
    # One file is the same, whether it might have been more or not.
    return layout if layout.index is not None else one_file(path, plan.header, plan.header_bytes)


def _write(
    reader: Reader,
    plan: Plan,
    layout: Layout,
    conversion: Conversion,
    device: torch.device,
    on_layer: OnLayer,
    execution: Execution,
    memory: MemoryPlan,
) -> list[LayerResult]:
    """The work; what stops it says what remains of it."""
    source = reader.fingerprint
    writer = Writer(layout, _fingerprint(reader, plan, layout, conversion, device), execution.restart)
    try:
        with writer:
            layers = run_plan(reader, plan, writer, conversion, device, on_layer, memory)
            if reader.fingerprint != source:
                raise InputError(f"{reader.path}: changed while it was converted; begin again when nobody writes to it")
            return layers
    except UnfinishedError as error:
        raise UnfinishedError(f"{error}; {writer.kept()}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(writer.kept()) from None


def _fingerprint(
    reader: Reader, plan: Plan, layout: Layout, conversion: Conversion, device: torch.device
) -> Fingerprint:
    """What decides the bytes of the output: an unfinished run goes on only if all of it is the same."""
    settings = {f"--{name}": _plain(value) for name, value in conversion.settings().items()}
    # Rounding to nearest gives the same bits everywhere; the sums of learned rounding don't.
    where = {} if conversion.rounding.simple else {"--device": device.type}
    version = {"lrq's version": __version__}
    known = {f"the file of {key}": _plain(plan.inputs.provenance.get(key)) for key in FILES}
    return {**version, **reader.fingerprint, **settings, **known, **where, "the output's header": layout.digest}


def _plain(value: Any) -> Any:
    """As the journal gives it back."""
    return json.dumps(value, sort_keys=True) if isinstance(value, tuple | list | dict) else value


def _peak_vram(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


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
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def verify(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    calib: str | os.PathLike[str] | None = None,
    on_layer: Callable[[LayerReport], None] = lambda layer: None,
) -> Verification:
    """Check a converted file, and measure its error against ``source`` if that is given.

    Args:
        calib: statistics of the layers' inputs, for the error of the outputs that they predict; needs ``source``.

    Returns:
        The layers with their errors, and the checks that failed.

    Raises:
        InputError: one of the files can't be read.
    """
    if calib is not None and source is None:
        raise InputError("--calib: predicts errors against a source; name it with --source")
    stats = None if calib is None else load_stats(calib)
    with Reader(output) as reader:
        if source is None:
            return verify_file(reader, None, on_layer)
        with Reader(source) as original:
            return verify_file(reader, original, on_layer, stats)
