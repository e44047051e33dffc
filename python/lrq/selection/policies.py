"""Which policy holds for which part of a checkpoint: the presets that were asked for, or that of its model."""

from __future__ import annotations

from typing import Any

from lrq.checkpoint.header import Entry
from lrq.errors import InputError
from lrq.models.patterns import skeleton
from lrq.models.policy import SUFFIX, Policy, load_policy, policy_of
from lrq.models.preset import NONE, Preset, find_preset
from lrq.models.recognition import Part


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
    presets = list({preset.name: preset for preset in map(find_preset, asked)}.values())
    used: set[str] = set()
    policies = {}
    for part in parts:
        fitting = [preset for preset in presets if _concerns(preset, part, tensors[part.prefix])]
        used |= {preset.name for preset in fitting}
        if fitting:
            policies[part.prefix] = policy_of(fitting)
        else:
            policies[part.prefix] = load_policy() if part.preset is None else policy_of((part.preset,))
    for preset in presets:
        if preset.name not in used:
            raise InputError(f"--preset {preset.name}: finds no layer in {where}, which is {describe(parts)}")
    return policies


def describe(parts: list[Part]) -> str:
    """The models of a checkpoint for an error: what they are, and the preset that knows them."""
    known = [f"{part.about} (--preset {part.preset.name})" for part in parts if part.preset is not None]
    return f"recognised as {' + '.join(known)}" if known else "not recognised; leave the preset away"


def _concerns(preset: Preset, part: Part, tensors: list[Entry]) -> bool:
    if part.preset is not None and part.preset.name == preset.name:
        return True
    start = len(part.prefix)
    names = {entry.name[start:].removesuffix(SUFFIX) for entry in tensors}
    kinds = {skeleton(name): name for name in names}
    numbered = any(rule.patterns.has_numbered for rule in (*preset.keep, *preset.drop, *preset.rules))
    return any(map(preset.finds, names if numbered else kinds.values()))
