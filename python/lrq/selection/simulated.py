"""Statistics of a checkpoint's layers without a run: of normal inputs, or of what its norms and activations give."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lrq.calibration.activations import activated, features_of, gated
from lrq.calibration.inputs import BINS, InputStats
from lrq.calibration.lora import layers_of_lora, with_directions
from lrq.calibration.simulate import TOKENS, deviations, feeds, from_norm, fronts, standard_normal
from lrq.calibration.stats import SIMULATED, sha256_of
from lrq.checkpoint.header import Entry
from lrq.checkpoint.reader import Reader
from lrq.errors import InputError, printable
from lrq.models.policy import FLOAT_DTYPES, SUFFIX
from lrq.models.recognition import assign, recognise

LARGEST = 1e36
"""A larger second moment leaves float32 soon."""
NORMS, GAUSSIAN = "norms", "gaussian"
KINDS = (NORMS, GAUSSIAN)


class SimulatedInputs(Mapping[str, InputStats]):
    """Statistics by layer [N,K], each computed when it is asked for; in the place of a file of them.

    ``norms``: layers behind norms, and those that read the activation of such a layer, by the function that the
    model's preset names. ``gaussian``: every layer reads standard normal numbers. A LoRA adds the directions that it
    reads, to layers of which nothing else is known as well.
    """

    origin, measured = SIMULATED, False
    transposed: tuple[str, ...] = ()

    def __init__(self, source: Reader, kind: str, tokens: int = TOKENS, lora: str | None = None) -> None:
        self.path, self.kind = Path(f"{source.path} ({kind})"), kind
        self._source, self._tokens = source, tokens
        entries = source.entries
        linear = {
            entry.name.removesuffix(SUFFIX): entry.shape[-1]
            for entry in entries.values()
            if entry.name.endswith(SUFFIX) and len(entry.shape) == 2 and entry.size and entry.dtype in FLOAT_DTYPES
        }
        self._lora, self._directions = lora, dict[str, Entry]()
        self._about_lora = ""
        if lora is not None:
            with Reader(lora) as reader:
                matrices = {key: entry for key, entry in reader.entries.items() if len(entry.shape) == 2}
                named = layers_of_lora(matrices, linear)
                self._directions = {layer: matrices[key] for layer, key in named.items()}
                self._about_lora = " ".join(map(sha256_of, reader.files))
            if not self._directions:
                raise InputError(f"{lora}: holds no LoRA for a layer of {source.path}; it is of another model")
            for entry in self._directions.values():
                if entry.dtype not in FLOAT_DTYPES:
                    raise InputError(f"{lora}: {printable(entry.name)}: A must be a float tensor, is {entry.dtype}")
        norms = {layer: norm for layer, norm in feeds(entries.keys()).items() if self._fits(layer, norm, linear)}
        self._norms = norms if kind == NORMS else {}
        self._fronts = self._activations(linear) if kind == NORMS else {}
        known = linear if kind == GAUSSIAN else self._norms.keys() | self._fronts.keys() | self._directions.keys()
        self._columns = {layer: linear[layer] for layer in sorted(known)}
        self._cached = lru_cache(2)(self._without_lora)

    def _fits(self, layer: str, norm: str, linear: Mapping[str, int]) -> bool:
        gain = self._source.entries[norm + SUFFIX]
        return gain.dtype in FLOAT_DTYPES and gain.shape == (linear.get(layer),)

    def _activations(self, linear: Mapping[str, int]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Function and layers in front, by layer."""
        parts = recognise(self._source.entries)
        of_part = assign(parts, self._source.entries.values())
        functions = {
            entry.name.removesuffix(SUFFIX): part.preset.activation
            for part in parts
            if part.preset is not None and part.preset.activation
            for entry in of_part[part.prefix]
        }
        found = {}
        for layer, before in fronts(self._source.entries.keys()).items():
            rows = {self._source.entries[one + SUFFIX].shape[0] for one in before}
            if layer in functions and all(one in self._norms for one in before) and rows == {linear.get(layer)}:
                found[layer] = functions[layer], before
        return found

    def _read(self, name: str) -> Tensor | None:
        return self._source.read(name) if name in self._source.entries else None

    def _weight(self, layer: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._read(layer + SUFFIX), self._read(f"{layer}.bias")
        assert weight is not None
        return weight, bias if bias is not None and bias.shape == weight.shape[:1] else None

    def _without_lora(self, layer: str) -> InputStats:
        if layer in self._norms:
            gain, bias = self._weight(self._norms[layer])
            return from_norm(gain, bias, self._tokens)
        if layer not in self._fronts:
            return standard_normal(self._columns[layer], self._tokens)
        function, before = self._fronts[layer]
        inputs, most = self._cached(before[0]), deviations(self._tokens, self._columns[layer])
        if len(before) == 1:
            return activated(function, features_of(*self._weight(before[0]), inputs), self._tokens, most)
        return gated(function, self._weight(before[0]), self._weight(before[1]), inputs, self._tokens, most)

    def __getitem__(self, layer: str) -> InputStats:
        if layer not in self._columns:
            raise KeyError(layer)
        stats = self.brief(layer)
        if layer not in self._directions:
            return stats
        assert self._lora is not None
        name = self._directions[layer].name
        try:
            with Reader(self._lora) as reader:
                return with_directions(stats, reader.read(name))
        except ValueError as error:
            raise InputError(f"{self._lora}: {printable(name)}: {error}") from None

    def brief(self, layer: str) -> InputStats:
        """The same without the directions of a LoRA."""
        stats = self._cached(layer)
        if not (torch.isfinite(stats.mean).all() and stats.second.max() < LARGEST and stats.amax**2 < LARGEST):
            what = self._norms.get(layer) or ", ".join(self._fronts.get(layer, ("", ()))[1])
            raise InputError(
                f"{self._source.path}: layer {printable(layer)}: what it would read of {printable(what)} is not "
                "finite, or beyond float32; repair the source, or leave --simulate away"
            )
        return stats

    def size(self, layer: str) -> int:
        """Bytes of a layer's statistics in memory."""
        rank = self._directions[layer].shape[0] if layer in self._directions else 0
        return 8 * ((2 + rank) * self._columns[layer] + BINS)

    def columns(self, layer: str) -> int:
        """K of a layer."""
        return self._columns[layer]

    def digest(self) -> str:
        """SHA-256, hexadecimal, of all that they hang on beside the source: the LoRA's bytes among it."""
        return hashlib.sha256(f"{self.kind} {self._tokens} {self._about_lora}".encode()).hexdigest()

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)
