"""Which policy holds for which part of a checkpoint: the presets that were asked for, or that of its model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lrq.calibration.activations import FUNCTIONS
from lrq.checkpoint.header import Entry
from lrq.errors import InputError, printable
from lrq.formats import FORMATS
from lrq.formats.int8 import Int8
from lrq.models.patterns import skeleton
from lrq.models.policy import SUFFIX, Policy, load_policy, policy_of
from lrq.models.preset import NONE, Preset, find_preset, load_table
from lrq.models.recognition import Part
from lrq.selection.storage import CONVROT_GROUPS, NAMES, nearest

FAMILIES = ("fp8", "int8", "nvfp4", "mxfp8")
"""What the run's format is called, whatever its scaling."""
_FORMATS = [
    *dict.fromkeys([*(fmt.name for fmt in FORMATS.values()), *(Int8("row", 0, n).name for n in CONVROT_GROUPS)])
]


def choose_policies(
    parts: list[Part], tensors: dict[str, list[Entry]], asked: tuple[str | dict[str, Any], ...], where: str
) -> dict[str, Policy]:
    """The policy of every part, by its prefix.

    Raises:
        InputError: no such preset, or one whose patterns find nothing; the message names the recognised model.
    """
    if NONE in asked:
        if len(asked) > 1:
            raise InputError(f"--preset {NONE}: has no meaning beside another preset")
        return {part.prefix: policy_of(()) for part in parts}
    # One that is named twice acts once; two of one name, a file's and the package's, both do.
    presets = list(dict.fromkeys(map(_preset, asked)))
    at_home = {preset for preset in presets if any(part.preset and part.is_for(preset) for part in parts)}
    used: set[Preset] = set()
    policies = {}
    for part in parts:
        # In another model of the checkpoint a preset has no business once its own is there.
        near = [preset for preset in presets if not part.preset or part.is_for(preset) or preset not in at_home]
        fitting = [preset for preset in near if _concerns(preset, part, tensors[part.prefix])]
        used |= set(fitting)
        if fitting:
            policies[part.prefix] = policy_of(fitting)
        else:
            policies[part.prefix] = load_policy() if part.preset is None else policy_of((part.preset,))
    for preset in presets:
        if preset not in used:
            raise InputError(f"--preset {preset.name}: finds no layer in {where}, which is {describe(parts)}")
    return policies


def load_preset(path: str) -> dict[str, Any]:
    """The table of a preset's file; raises :class:`InputError` for what is wrong in it."""
    table = load_table(path)
    check_words(find_preset(table), f"--preset {path}")
    return table


def _preset(given: str | dict[str, Any]) -> Preset:
    preset = find_preset(given)
    if isinstance(given, dict):
        check_words(preset, f"preset {printable(preset.name)}")
    return preset


def check_words(preset: Preset, where: str) -> None:
    """Raise :class:`InputError` for a format or a function that there is not."""
    if preset.activation:
        _known(preset.activation, FUNCTIONS, f"{where}: activation", "function")
    for kind in ("keep", "rules"):
        for number, rule in enumerate(getattr(preset, kind), 1):
            at = f"{where}: {kind} {number}"
            for name in rule.formats or ():
                _known(name, _FORMATS, f"{at}: formats", "format")
            for name in rule.when:
                _known(name, FAMILIES, f"{at}: when", "format")
            if kind == "rules":
                _known(rule.format, NAMES, f"{at}: format", "format")


def _known(name: str, words: Collection[str], where: str, noun: str) -> None:
    if name not in words:
        raise InputError(f"{where}: no such {noun} {printable(name)!r}; {nearest(name, words)}")


def describe(parts: Sequence[Part]) -> str:
    """The models of a checkpoint for an error: what they are, and the preset that knows them."""
    known = [f"{part.about} (--preset {part.preset.name})" for part in parts if part.preset is not None]
    return f"recognised as {' + '.join(known)}" if known else "not recognised; leave the preset away"


def _concerns(preset: Preset, part: Part, tensors: list[Entry]) -> bool:
    if part.preset is preset:
        return True
    start = len(part.prefix)
    names = {entry.name[start:].removesuffix(SUFFIX) for entry in tensors}
    kinds = {skeleton(name): name for name in names}
    numbered = any(rule.patterns.has_numbered for rule in (*preset.keep, *preset.drop, *preset.rules))
    return any(map(preset.finds, names if numbered else kinds.values()))
