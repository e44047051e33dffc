"""The file of statistics, ``stats.safetensors`` (docs/FORMATS.md section 6), and what it holds.

Tensors of a layer L, the checkpoint's key without ``.weight``: ``L.count`` I64 [], ``L.mean`` and ``L.second`` F64 [K],
``L.amax`` F32 [], ``L.histogram`` I64 [BINS], and ``L.gram`` F32 [K,K], or ``L.eigenvectors`` F32 [K,r] with
``L.eigenvalues`` F32 [r], or neither. Metadata: ``lrq_stats`` is the version of this layout, ``origin`` says whether
the inputs were measured or simulated; what else stands there is for people.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrq.calibration.accumulator import Accumulator
from lrq.calibration.inputs import BINS, InputStats, merge
from lrq.errors import InputError, printable, unread

__all__ = ["Accumulator", "InputStats", "StatsFile", "load_stats", "merge", "merge_stats", "save_stats"]

VERSION = "1"
"""Of the layout, under ``lrq_stats``."""
SLACK = 1e-6
"""What rounding may add to a squared mean, relative to the second moment."""
ROUGH = 0.05
"""What rounding may add to a second moment, relative to the largest input's square."""
MEASURED, SIMULATED = "measured", "simulated"
"""Origins: real inputs of a run, or a guess from the checkpoint, which never moves a bias."""
REQUIRED = {"count": "I64", "mean": "F64", "second": "F64", "amax": "F32", "histogram": "I64"}
OPTIONAL = {"gram": "F32", "eigenvectors": "F32", "eigenvalues": "F32"}
"""Dtypes by suffix."""


def save_stats(path: str | os.PathLike[str], stats: Mapping[str, InputStats], origin: str, **about: str) -> None:
    """Write statistics by layer; the name appears when the file is whole.

    Args:
        origin: ``measured`` or ``simulated``.
        **about: more metadata.

    Raises:
        InputError: no layer, or the file can't be written.
    """
    if origin not in (MEASURED, SIMULATED):
        raise ValueError(f"origin must be {MEASURED} or {SIMULATED}, got {origin!r}")
    if origin == MEASURED and getattr(stats, "origin", None) == SIMULATED:
        raise InputError(f"{path}: these statistics are simulated; save them as {SIMULATED}")
    if transposed := getattr(stats, "transposed", ()):
        about.setdefault("transposed", "\n".join(transposed))
    if not stats:
        raise InputError(f"{path}: there are no statistics to save; no layer saw an input")
    tensors: dict[str, Tensor] = {}
    for layer, one in stats.items():
        tensors |= {f"{layer}.{suffix}": tensor.contiguous().clone() for suffix, tensor in _tensors(one).items()}
    target = Path(path)
    # No name of a conversion's, which may be under way.
    unfinished = target.with_name(f".lrq-stats-{uuid.uuid4().hex}")
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: is a folder, a device or a pipe; name a file")
    about = {key: "\n".join(map(printable, value.split("\n"))) for key, value in about.items()}
    try:
        save_file(tensors, unfinished, {**about, "lrq_stats": VERSION, "origin": origin})
        _sort_metadata(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{path}: can't be written: {getattr(error, 'strerror', None) or error}") from None


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sort_metadata(path: Path) -> None:
    """The library writes metadata in an order that changes from run to run; the same statistics are the same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _umask() -> int:
    # It can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _tensors(stats: InputStats) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {
        "count": torch.tensor(stats.count, dtype=torch.int64),
        "mean": stats.mean.double(),
        "second": stats.second.double(),
        "amax": torch.tensor(stats.amax, dtype=torch.float32),
        "histogram": stats.histogram,
        "gram": stats.gram,
        "eigenvectors": stats.vectors,
        "eigenvalues": stats.values,
    }
    return {suffix: tensor.cpu() for suffix, tensor in found.items() if tensor is not None}


class StatsFile(Mapping[str, InputStats]):
    """Statistics by layer, each read when it is asked for; names, dtypes and shapes are checked at once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        file = self._open()
        self._stamp = self._stamped()
        self.metadata: dict[str, str] = file.metadata() or {}
        version, self.origin = self.metadata.get("lrq_stats"), self.metadata.get("origin", "")
        if version is None:
            raise InputError(f"{self.path}: holds no input statistics; lrq calibrate makes such a file")
        if version != VERSION:
            raise InputError(f"{self.path}: statistics of layout {printable(version)}; this lrq reads {VERSION}")
        if self.origin not in (MEASURED, SIMULATED):
            origin = printable(self.origin)
            raise InputError(f"{self.path}: origin must be {MEASURED} or {SIMULATED}, is {origin!r}")
        self._layers: dict[str, dict[str, tuple[int, ...]]] = {}
        for key in self._guarded(file.keys):
            self._note(key, self._guarded(partial(file.get_slice, key)))
        for layer, shapes in self._layers.items():
            self._check(layer, shapes)

    @property
    def measured(self) -> bool:
        """Whether the inputs are real ones."""
        return self.origin == MEASURED

    @property
    def transposed(self) -> tuple[str, ...]:
        """Layers whose checkpoint stores the weight as [K,N]; their statistics do not fit what is quantized."""
        return tuple(filter(None, self.metadata.get("transposed", "").split("\n")))

    def digest(self) -> str:
        """SHA-256 of the file, hexadecimal."""
        return sha256_of(self.path)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            # The library's own errors have no strerror.
            what = "is a folder" if self.path.is_dir() else f"can't be read: {error.strerror or unread(self.path)}"
            raise InputError(f"{self.path}: {what}") from None
        except SafetensorError as error:
            raise InputError(f"{self.path}: no safetensors file: {printable(str(error))}") from None

    def _open(self) -> Any:
        return self._guarded(lambda: safe_open(self.path, "pt"))

    def _stamped(self) -> tuple[int, int, int]:
        known = self._guarded(self.path.stat)
        return known.st_ino, known.st_size, known.st_mtime_ns

    def _note(self, key: str, part: Any) -> None:
        layer, _, suffix = key.rpartition(".")
        expected = (REQUIRED | OPTIONAL).get(suffix)
        if expected is None or not layer:
            raise InputError(f"{self.path}: tensor {printable(key)} is no statistic")
        if part.get_dtype() != expected:
            raise InputError(f"{self.path}: tensor {printable(key)} must be {expected}, is {part.get_dtype()}")
        self._layers.setdefault(layer, {})[suffix] = tuple(part.get_shape())

    def _check(self, layer: str, shapes: dict[str, tuple[int, ...]]) -> None:
        where = f"{self.path}: layer {printable(layer)}"
        for suffix in REQUIRED:
            if suffix not in shapes:
                raise InputError(f"{where}: {suffix} is missing")
        if len(shapes["mean"]) != 1 or not shapes["mean"][0]:
            raise InputError(f"{where}: mean must be [K], is {list(shapes['mean'])}")
        (columns,) = shapes["mean"]
        rank = shapes.get("eigenvalues", (0,))[0] if len(shapes.get("eigenvalues", (0,))) == 1 else 0
        wanted: dict[str, tuple[int, ...]] = {"count": (), "amax": (), "second": (columns,), "histogram": (BINS,)}
        wanted |= {"gram": (columns, columns), "eigenvectors": (columns, rank), "eigenvalues": (rank,)}
        for suffix, shape in shapes.items():
            if suffix in wanted and shape != wanted[suffix]:
                raise InputError(f"{where}: {suffix} must be {list(wanted[suffix])}, is {list(shape)}")
        if "eigenvalues" in shapes and not rank:
            raise InputError(f"{where}: has no eigenvalue; leave the tensors away")
        if ("eigenvectors" in shapes) != ("eigenvalues" in shapes):
            raise InputError(f"{where}: has eigenvectors or eigenvalues, but not both")

    def __getitem__(self, layer: str) -> InputStats:
        """Raises InputError for values that no inputs have."""
        if layer not in self._layers:
            raise KeyError(layer)
        return self._read(layer, self._layers[layer])

    def brief(self, layer: str) -> InputStats:
        """The statistics without the second moments across inputs, which are large."""
        return self._read(layer, REQUIRED)

    def _read(self, layer: str, suffixes: Iterable[str]) -> InputStats:
        # The library maps the file: opened anew and copied, what was read of it leaves the memory with the layer.
        file = self._open()
        if self._stamped() != self._stamp:
            raise InputError(f"{self.path}: changed while it was in use; start again")
        found: dict[str, Tensor] = {
            suffix: self._guarded(partial(file.get_tensor, f"{layer}.{suffix}")).clone() for suffix in suffixes
        }
        del file
        where = f"{self.path}: layer {printable(layer)}"
        for suffix, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"{where}: {suffix} is NaN or infinite")
            if suffix not in ("mean", "gram", "eigenvectors") and (tensor < 0).any():
                raise InputError(f"{where}: {suffix} is negative")
        if (found["mean"].square() > found["second"] * (1 + SLACK) + torch.finfo(torch.float32).tiny).any():
            raise InputError(f"{where}: a squared mean is larger than the second moment; they are of no inputs")
        if self.measured and found["second"].max() > (1 + ROUGH) * found["amax"].double().square():
            raise InputError(f"{where}: a second moment is larger than amax squared; they are of no inputs")
        if not found["count"] or not found["histogram"].sum():
            raise InputError(f"{where}: its count is 0")
        return InputStats(
            int(found["count"].item()),
            found["mean"],
            found["second"],
            found["amax"].item(),
            found["histogram"],
            found.get("gram"),
            found.get("eigenvectors"),
            found.get("eigenvalues"),
        )

    def size(self, layer: str) -> int:
        """Bytes of a layer's statistics in memory."""
        return sum(8 * math.prod(shape) for shape in self._layers[layer].values())

    def columns(self, layer: str) -> int:
        """K of a layer, without reading it."""
        return self._layers[layer]["mean"][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def load_stats(path: str | os.PathLike[str]) -> StatsFile:
    """Open a file of statistics.

    Raises:
        InputError: the file can't be read, or is not what this module describes.
    """
    return StatsFile(path)


class MergedStats(dict[str, InputStats]):
    """Statistics of several runs by layer, with what their files said of all layers."""

    origin: str | None = None
    """Measured or simulated; None where no part says."""
    transposed: tuple[str, ...] = ()
    """Layers that are stored as [K,N]."""


def merge_stats(*samples: Mapping[str, InputStats]) -> MergedStats:
    """Statistics of several runs together, by layer.

    Raises:
        InputError: a layer has another K there, or some are measured and others simulated.
    """
    merged = MergedStats()
    origins = {getattr(sample, "origin", None) for sample in samples} - {None}
    if len(origins) > 1:
        raise InputError("statistics of real inputs and simulated ones can't be merged; merge the measured ones alone")
    merged.origin = next(iter(origins), None)
    merged.transposed = tuple(sorted({layer for sample in samples for layer in getattr(sample, "transposed", ())}))
    for sample in samples:
        for layer, one in sample.items():
            try:
                merged[layer] = merge(merged[layer], one) if layer in merged else one
            except ValueError as error:
                raise InputError(f"layer {printable(layer)}: {error}") from None
    return merged
