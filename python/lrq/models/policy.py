"""Which tensors of a checkpoint are weights to quantize, by name and shape; the rules themselves are data (*.toml)."""

from __future__ import annotations

import fnmatch
import math
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from lrq.checkpoint.header import Entry

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
SUFFIX = ".weight"
NOT_A_WEIGHT = "not a matrix of weights"
UNNAMED_BANK = "bank of experts without .weight in its name: no loader would find its scales"
QUANTIZED_SIBLINGS = ("comfy_quant", "weight_scale", "scale_weight", "weight_s_rel")
"""A weight beside one of these is quantized already, whatever its dtype."""


@dataclass(frozen=True)
class Rule:
    """Keep a module that one of the patterns finds."""

    why: str
    patterns: re.Pattern[str]


@dataclass(frozen=True)
class Policy:
    """What to keep in high precision, and why."""

    about: str
    keep: tuple[Rule, ...]
    banks: re.Pattern[str]
    keep_outside_blocks: bool

    def refusals(self, entries: Iterable[Entry]) -> dict[str, str]:
        """For every tensor of a checkpoint that is not to be quantized, the reason."""
        entries = list(entries)
        names = {entry.name for entry in entries}
        refused = {entry.name: reason for entry in entries if (reason := self._refusal(entry, names)) is not None}
        if self.keep_outside_blocks:
            candidates = [entry for entry in entries if entry.name not in refused]
            refused |= {name: "outside of the numbered blocks" for name in _outside_blocks(candidates)}
        return refused

    def _refusal(self, entry: Entry, names: set[str]) -> str | None:
        if not entry.name.endswith(SUFFIX) or len(entry.shape) < 2:
            bare_bank = len(entry.shape) == 3 and self.banks.search(entry.name) is not None
            return UNNAMED_BANK if bare_bank else NOT_A_WEIGHT
        module = entry.name.removesuffix(SUFFIX)
        if any(f"{module}.{sibling}" in names for sibling in QUANTIZED_SIBLINGS):
            return "quantized already"
        if entry.dtype not in FLOAT_DTYPES:
            return f"{entry.dtype}"
        is_bank = len(entry.shape) == 3 and self.banks.search(module) is not None
        if len(entry.shape) != 2 and not is_bank:
            return f"{len(entry.shape)}-D"
        if 0 in entry.shape:
            return "empty"
        return next((rule.why for rule in self.keep if rule.patterns.search(module)), None)


def _outside_blocks(candidates: list[Entry]) -> set[str]:
    """Names outside of the numbered blocks, if the blocks hold most of the weights; else none.

    A numbered block is ``stack.N.part``: a bare ``stack.N`` is an entry of a sequence. One block alone is no stack.
    """
    numbers: dict[str, set[str]] = defaultdict(set)
    stack_of: dict[str, str] = {}
    for entry in candidates:
        found = re.match(r"(?:(.*?)\.)?(\d+)\..", entry.name.removesuffix(SUFFIX))
        if found:
            stack_of[entry.name] = found[1] or ""
            numbers[found[1] or ""].add(found[2])
    inside = {name for name, stack in stack_of.items() if len(numbers[stack]) > 1}
    weights = {entry.name: math.prod(entry.shape) for entry in candidates}
    if 2 * sum(weights[name] for name in inside) < sum(weights.values()):
        return set()
    return weights.keys() - inside


def _compile(patterns: list[str]) -> re.Pattern[str]:
    """One expression that finds any of the patterns between dots."""
    translated = (r"\.".join(map(_translate, pattern.split("."))) for pattern in patterns)
    return re.compile(rf"(?:^|\.)(?:{'|'.join(translated)})(?:\.|$)")


def _translate(part: str) -> str:
    """One part of a pattern, without the anchors of ``fnmatch``; its ``*`` stops at a dot."""
    return fnmatch.translate(part).removeprefix("(?s:").rsplit(")", 1)[0].replace(".*", "[^.]*")


@cache
def load_policy(name: str = "generic") -> Policy:
    """The policy of this name among the package's data files."""
    table = tomllib.loads(resources.files(__package__).joinpath(f"{name}.toml").read_text())
    keep = tuple(Rule(rule["why"], _compile(rule["patterns"])) for rule in table["keep"])
    return Policy(table["about"], keep, _compile(table["banks"]), table["keep_outside_blocks"])
