"""Tensors that statistics of the inputs changed or added: what a file records of them, and what they must be."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from lrq.calibration.input_scales import input_scale
from lrq.calibration.inputs import InputStats
from lrq.calibration.naming import match_names
from lrq.calibration.stats import StatsFile
from lrq.checkpoint.header import Entry
from lrq.checkpoint.layout import PROVENANCE
from lrq.checkpoint.reader import Reader
from lrq.config import Rounding
from lrq.config.calibration import Calibration
from lrq.dialects import comfyui
from lrq.errors import InputError, printable
from lrq.formats import Format, Tensors
from lrq.models.policy import FLOAT_DTYPES, SUFFIX
from lrq.plan import CALIBRATION, PATCHES
from lrq.repair.bias import OutputError, corrected, mean_shift, output_error

WORSE_OUTPUTS = 1.1
"""Codes that follow statistics lower the error that these predict; damping may cost a little."""
ROUNDING = 1e-5
"""What sums in another order may change, relative to the largest."""


@dataclass(frozen=True)
class Changes:
    """Layers by what was done to them."""

    corrected: frozenset[str] = frozenset()
    """Their bias took the mean error."""
    added: frozenset[str] = frozenset()
    """They had no bias, and have one now."""
    input_scales: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()
    """Statistics of their inputs were there: if they were not rounded simply, codes and block scales follow those."""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors that are not the source's."""
        biases = {f"{layer}.{comfyui.BIAS}" for layer in self.corrected | self.added}
        return frozenset(biases | {f"{layer}.{comfyui.INPUT_SCALE}" for layer in self.input_scales})


@dataclass(frozen=True)
class Expected:
    """How a layer was made, as far as that is recorded."""

    rounding: Rounding
    own: bool
    """By this version."""
    measured: bool
    """With statistics of its inputs."""

    def scales_chosen(self, fmt: Format) -> bool:
        """Whether block scales follow the codes or statistics, not the weight alone."""
        rounding = self.rounding
        if not fmt.has_scale_search:
            return False
        return rounding.scale_search if self.measured else not rounding.simple and rounding.scale_rounds > 0

    def codes_chosen(self, fmt: Format) -> bool:
        """Whether the codes are others than the nearest ones of the weight's own scales."""
        return not self.rounding.simple or self.scales_chosen(fmt)

    def calibrated(self, fmt: Format) -> bool:
        """Codes or block scales follow statistics, which are not there now."""
        return self.measured and self.codes_chosen(fmt)


def recorded_changes(output: Reader) -> Changes:
    """What the file records; nothing where it records nothing that can be read."""
    try:
        entry = json.loads(output.header.metadata[PROVENANCE])[CALIBRATION]
        keys = ("corrected_biases", "added_biases", "input_scales", "measured_layers")
        return Changes(*(frozenset(map(str, entry.get(key, ()))) for key in keys))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return Changes()


@dataclass(frozen=True)
class Predicted:
    """What statistics of a layer's inputs say of its outputs."""

    statistics: str
    """Which those are."""
    error: OutputError
    corrected: bool
    """Whether its bias took the mean error."""

    @property
    def left(self) -> float:
        """The error of its outputs as the file has it, bias and all."""
        return self.error.after if self.corrected else self.error.before


class Predictions:
    """Predicts by a file of statistics, for a file with layers of some names.

    Raises:
        InputError: no layer has statistics, or they are of another model.
    """

    def __init__(self, stats: StatsFile, layers: Collection[str], output: Reader, made: Calibration) -> None:
        self._stats, self._output = stats, output
        self._changes = recorded_changes(output)
        digest = stats.digest()
        self._own = _digest_of_statistics(output) == digest
        takes = self._own and made.actcal and made.input_scales is None
        self._converted = made.actcal_percentile if takes else None
        self._patched = _patched(output, digest)
        self._names, _ = match_names([name for name in stats if name not in stats.transposed], set(layers))
        if not self._names:
            raise InputError(f"{stats.path}: has no quantized layer; the statistics are of another model")

    def of(self, name: str, fmt: Format, tensors: Tensors, w: torch.Tensor, source: Reader) -> Predicted | None:
        """For a layer with this weight [N,K] or [E,N,K] and stored tensors; None without statistics of it.

        Raises:
            InputError: they have another width.
        """
        if name not in self._names:
            return None
        known = self._names[name]
        if self._stats.columns(known) != w.shape[-1]:
            raise InputError(
                f"{self._stats.path}: layer {printable(known)} has {self._stats.columns(known)} inputs, the weight "
                f"has {w.shape[-1]}; they are of another model"
            )
        stats, moved = self._stats[known], name in self._changes.corrected | self._changes.added
        error = error_of_outputs(fmt, tensors, w, stats)
        biases = self._biases(name, source) if moved else None
        if biases is not None and biases[0].shape == w.shape[:1] == biases[1].shape:
            shift = mean_shift(w, fmt.dequantize(tensors, tuple(w.shape)), stats.mean)
            error = error.with_bias(shift, biases[0].double() - biases[1].double())
        return Predicted(stats.about, error, moved)

    def _biases(self, name: str, source: Reader) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of the source and of the output."""
        bias = f"{name}.{comfyui.BIAS}"
        if bias not in self._output.entries:
            return None
        found = self._output.read(bias)
        return source.read(bias) if bias in source.entries else torch.zeros_like(found), found

    def check(
        self, name: str, fmt: Format, tensors: Tensors, w: torch.Tensor, source: Reader, predicted: Predicted | None
    ) -> None:
        """Raise ValueError for what the statistics did not make of a layer, if the file was made with these."""
        if name in self._names:
            self._check_scale(name, fmt, w)
        if predicted is None or not self._own:
            return
        stats, error = self._stats[self._names[name]], predicted.error
        if predicted.corrected:
            self._check_bias(name, fmt, tensors, w, source, stats)
        if name in self._changes.measured and predicted.left > WORSE_OUTPUTS * error.of_nearest:
            times = predicted.left / error.of_nearest
            raise ValueError(
                f"the statistics predict {times:.3g} times round-to-nearest's error of its outputs; some bytes are not "
                "those that were written"
            )

    def _check_scale(self, name: str, fmt: Format, w: torch.Tensor) -> None:
        """The input scale, if these statistics made it: in the conversion, or afterwards."""
        percentile = self._patched.get(name, self._converted)
        limit, scale = comfyui.largest_input(fmt, tuple(w.shape)), f"{name}.{comfyui.INPUT_SCALE}"
        if percentile is None or limit is None or scale not in self._output.entries:
            return
        found, expected = self._output.read(scale), input_scale(self._stats.brief(self._names[name]), percentile, limit)
        if found.numel() == 1 and abs(found.item() - expected) > ROUNDING * expected:
            raise ValueError(f"{comfyui.INPUT_SCALE} is {found.item():.6g}, the statistics give {expected:.6g}")

    def _check_bias(
        self, name: str, fmt: Format, tensors: Tensors, w: torch.Tensor, source: Reader, stats: InputStats
    ) -> None:
        biases = self._biases(name, source)
        if biases is None:
            return
        (before, found), shift = biases, mean_shift(w, fmt.dequantize(tensors, tuple(w.shape)), stats.mean)
        if before.shape != shift.shape or before.dtype != found.dtype:
            return
        expected = corrected(before, shift).double()
        allowed = 2 * torch.finfo(found.dtype).eps * expected.abs() + ROUNDING * shift.abs().max()
        if not ((found.double() - expected).abs() <= allowed).all():
            raise ValueError("its bias is not what the statistics give")


def _patched(output: Reader, digest: str) -> dict[str, float | None]:
    """The percentile by layer, of input scales that were patched in; None for those that other things than these
    statistics gave."""
    try:
        patches = json.loads(output.header.metadata[PROVENANCE])[CALIBRATION].get(PATCHES, [])
        return {
            str(layer): float(patch["percentile"]) if patch.get("statistics") == digest else None
            for patch in patches
            for layer in patch["layers"]
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _digest_of_statistics(output: Reader) -> str | None:
    try:
        return str(json.loads(output.header.metadata[PROVENANCE])[CALIBRATION]["statistics"]["sha256"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return None


def error_of_outputs(fmt: Format, tensors: Tensors, w: torch.Tensor, stats: InputStats) -> OutputError:
    """That of stored tensors of a weight [N,K] or of a bank [E,N,K], whose experts have the same inputs."""
    single = w.float() if w.dtype == torch.float64 else w
    shape = tuple(w.shape)
    return output_error(w, fmt.dequantize(tensors, shape), fmt.dequantize(fmt.quantize(single, None), shape), stats)


def check_changes(output: Reader, source: Reader | None, changes: Changes, quantized: Collection[str]) -> Iterator[str]:
    """One line for everything that is not as recorded."""
    for layer in sorted((changes.corrected | changes.added | changes.input_scales) - set(quantized)):
        yield f"layer {printable(layer)}: has a corrected bias or an input scale, but is not quantized"
    for layer in sorted(changes.corrected | changes.added):
        name = f"{layer}.{comfyui.BIAS}"
        expected = None if source is None else _expected_bias(source, layer, layer in changes.added)
        yield from _check_bias(output, name, expected)
    for name, entry in output.entries.items():
        if name.endswith(f".{comfyui.INPUT_SCALE}") and name.rpartition(".")[0] in quantized:
            yield from _check_scale(output, entry)
    for layer in sorted(changes.input_scales):
        if f"{layer}.{comfyui.INPUT_SCALE}" not in output.entries:
            yield f"tensor {printable(layer)}.{comfyui.INPUT_SCALE}: is missing"


def _expected_bias(source: Reader, layer: str, added: bool) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape; None where the source has nothing to tell them from."""
    entry = source.entries.get(layer + (SUFFIX if added else f".{comfyui.BIAS}"))
    return None if entry is None else (entry.dtype, entry.shape[:1])


def _check_bias(output: Reader, name: str, expected: tuple[str, tuple[int, ...]] | None) -> Iterator[str]:
    entry, where = output.entries.get(name), f"tensor {printable(name)}"
    if entry is None:
        yield f"{where}: is missing"
    elif expected is not None and (entry.dtype, entry.shape) != expected:
        yield f"{where}: must be {expected[0]} {list(expected[1])}, is {entry.dtype} {list(entry.shape)}"
    elif entry.dtype not in FLOAT_DTYPES or not torch.isfinite(output.read(name)).all():
        yield f"{where}: is not finite"


def _check_scale(output: Reader, entry: Entry) -> Iterator[str]:
    where = f"tensor {printable(entry.name)}"
    if entry.dtype != "F32" or entry.shape not in ((), (1,)):
        yield f"{where}: must be F32 with one number, is {entry.dtype} {list(entry.shape)}"
        return
    value = output.read(entry.name).item()
    if not 0 < value < float("inf"):
        yield f"{where}: must be a positive number, is {value}"
