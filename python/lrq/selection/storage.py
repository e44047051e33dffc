"""The names of formats, what a rule may say of a layer, and which format a shape takes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from lrq.config import Storage
from lrq.errors import InputError, printable
from lrq.formats import Format, Shape, bfloat16
from lrq.formats.fp8 import Fp8
from lrq.formats.int8 import Int8
from lrq.formats.mxfp8 import Mxfp8
from lrq.formats.nvfp4 import Nvfp4
from lrq.settings import check_ranges

CONVROT_GROUPS = (256, 64)
"""Groups tried when none is asked for."""
_ROW, _BLOCK = {"scaling_mode": "row"}, {"scaling_mode": "block"}
NAMES: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8-row": _ROW,
    "fp8-block": _BLOCK,
    "int8": {"int8": True},
    "int8-tensor": {"int8": True},
    "int8-row": {"int8": True, **_ROW},
    "int8-block": {"int8": True, **_BLOCK},
    "int8-row-convrot": {"int8": True, **_ROW, "convrot": True},
    "nvfp4": {"nvfp4": True},
    "mxfp8": {"mxfp8": True},
    "float8_e4m3fn": {},
    "float8_e4m3fn_rowwise": _ROW,
    "float8_e4m3fn_blockwise": _BLOCK,
    "int8_tensorwise": {"int8": True},
    "int8_blockwise": {"int8": True, **_BLOCK},
}
"""Settings by the names of formats: lrq's own, and those of markers."""
FORMAT_KEYS = ("format", "block_size", "scaling_mode", "convrot", "convrot_group_size")
"""What decides on the format."""
_STORAGE_KEYS = (*FORMAT_KEYS[1:], "full_precision_matrix_mult")
SPEC_KEYS = ("format", "skip", "simple", *_STORAGE_KEYS)
"""What a rule may say of a layer; keys that begin with an underscore are comments."""
_KINDS: dict[str, type] = {
    "format": str,
    "skip": bool,
    "simple": bool,
    "block_size": int,
    "scaling_mode": str,
    "convrot": bool,
    "convrot_group_size": int,
    "full_precision_matrix_mult": bool,
}


@dataclass(frozen=True)
class Choice:
    """What a rule makes of a layer."""

    storage: Storage | None
    """None: it is not quantized."""
    why: str
    simple: bool | None = None
    """Round to nearest, or not; None: as the run does."""
    bfloat16: bool = False
    """Not quantized, but stored in 16 bits."""

    @property
    def stays(self) -> bool:
        """Whether it stays as it is."""
        return self.storage is None and not self.bfloat16


def nearest(word: str, known: Any) -> str:
    """A hint: the nearest of the known words, or all of them."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {printable(near[0])}?" if near else f"known are {', '.join(known)}"


def storage_of(name: str, where: str) -> Storage:
    """The storage that a format's name stands for; raises :class:`InputError` naming the nearest."""
    if name not in NAMES:
        raise InputError(f"{where}: no such format {printable(name)!r}; {nearest(name, (*NAMES, bfloat16.NAME))}")
    return Storage(**NAMES[name])


def choice_of(name: str, where: str, why: str) -> Choice:
    """What the value of a flag makes of a layer; raises :class:`InputError` naming the nearest."""
    if name == bfloat16.NAME:
        return Choice(None, why, bfloat16=True)
    return Choice(storage_of(name, where), why)


class SpecError(InputError):
    """A rule that says something wrong; ``key`` is the key at fault."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def read_spec(spec: Any, base: Storage, why: str) -> Choice:
    """What a rule makes of a layer; without a format, ``base`` with what the rule changes.

    Raises:
        SpecError: an unknown key or format, a value of the wrong type, or a combination that has no meaning.
    """
    if not isinstance(spec, dict):
        raise SpecError("", 'must be an object such as {"format": "fp8"}')
    spec = {key: value for key, value in spec.items() if not key.startswith("_")}
    for key, value in spec.items():
        if key not in SPEC_KEYS:
            raise SpecError(key, f"no such key {printable(key)!r}; {nearest(key, SPEC_KEYS)}")
        if type(value) is not _KINDS[key]:
            raise SpecError(key, f"{key} must be {_KINDS[key].__name__}, got {printable(repr(value))}")
    if spec.get("skip"):
        more = sorted(spec.keys() - {"skip"})
        if more:
            raise SpecError(more[0], f"{more[0]} has no meaning beside skip")
        return Choice(None, why)
    if spec.get("format") == bfloat16.NAME:
        more = sorted(spec.keys() - {"format", "skip"})
        if more:
            raise SpecError(more[0], f"{more[0]} has no meaning beside {bfloat16.NAME}")
        return Choice(None, why, bfloat16=True)
    if not spec.keys() - {"skip"}:
        raise SpecError("", 'says nothing; give a format, or "skip": true')
    return Choice(_storage(spec, base), why, spec.get("simple"))


def _storage(spec: dict[str, Any], base: Storage) -> Storage:
    changes = {key: spec[key] for key in _STORAGE_KEYS if key in spec}
    if "format" in spec:
        try:
            base = storage_of(spec["format"], "format")
        except InputError as error:
            raise SpecError("format", str(error).removeprefix("format: ")) from None
        if base.scaling_mode not in (None, changes.get("scaling_mode", base.scaling_mode)):
            raise SpecError("scaling_mode", f"{spec['format']} has scaling_mode {base.scaling_mode}")
    if spec.get("format") in ("int8_tensorwise", "int8-tensor") and "block_size" in changes:
        raise SpecError("block_size", f"{spec['format']} has no blocks; the format with blocks is int8_blockwise")
    if changes.get("convrot") and base.int8:
        changes.setdefault("scaling_mode", "row")
    try:
        storage = replace(base, **changes)
        if storage.scaling_mode not in (None, "tensor", "row", "block"):
            raise InputError(f"scaling_mode: {nearest(str(storage.scaling_mode), ('tensor', 'row', 'block'))}")
        check_ranges(storage)
        storage.check()
    except InputError as error:
        key = next((key for key in changes if f"--{key}" in str(error)), next(iter(changes), "format"))
        raise SpecError(key, str(error).replace("--", "")) from None
    return storage


def spec_of(fmt: Format, full_precision: bool = False, simple: bool | None = None) -> dict[str, Any]:
    """The rule that chooses exactly this format: the inverse of :func:`read_spec`."""
    spec: dict[str, Any] = {"format": fmt.marker()["format"]}
    if isinstance(fmt, Fp8 | Int8) and fmt.scaling == "block":
        spec["block_size"] = fmt.block
    if isinstance(fmt, Int8) and fmt.scaling == "row":
        spec["scaling_mode"] = "row"
        if fmt.convrot:
            spec |= {"convrot": True, "convrot_group_size": fmt.convrot}
    if full_precision:
        spec["full_precision_matrix_mult"] = True
    return spec if simple is None else {**spec, "simple": simple}


@cache
def choose_format(storage: Storage, shape: Shape) -> Format | str:
    """The format of a weight of this shape, or why it can't take it."""
    candidates: list[Format]
    if storage.family == "nvfp4":
        candidates = [Nvfp4()]
    elif storage.family == "mxfp8":
        candidates = [Mxfp8()]
    elif storage.family == "fp8":
        candidates = [Fp8(storage.scaling, (storage.block_size or 64) if storage.scaling == "block" else 0)]
    elif storage.convrot:
        groups = CONVROT_GROUPS if storage.convrot_group_size is None else (storage.convrot_group_size,)
        candidates = [Int8("row", 0, group) for group in groups]
    else:
        candidates = [Int8(storage.scaling, (storage.block_size or 128) if storage.scaling == "block" else 0)]
    reasons = [candidate.refusal(shape) for candidate in candidates]
    accepted = [candidate for candidate, reason in zip(candidates, reasons, strict=True) if reason is None]
    return accepted[0] if accepted else str(reasons[-1])
