"""Which tensors of a model are weights to quantize, by name and shape; the rules themselves are data (*.toml)."""

from __future__ import annotations

import math
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources

from lrq.checkpoint.header import Entry
from lrq.models.patterns import Patterns, skeleton
from lrq.models.preset import GENERIC, Preset, Rule, read_rules

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
SUFFIX = ".weight"
NOT_A_WEIGHT = "not a matrix of weights"
UNNAMED_BANK = "bank of experts without .weight in its name: no loader would find its scales"
OUTSIDE = "outside of the numbered blocks"
QUANTIZED_SIBLINGS = (".comfy_quant", ".weight_scale", ".scale_weight", ".weight_s_rel")
"""A weight beside one of these is quantized already, whatever its dtype."""


@dataclass(frozen=True)
class Verdict:
    """What a policy says of a module."""

    action: str
    """``quantize``, ``keep`` or ``drop``."""
    why: str = ""
    formats: tuple[str, ...] | None = None
    """Of a module that is kept: the formats that a rule of the user's may choose all the same; None: any."""
    rule: Rule | None = None
    """Of a module that is quantized: the preset's rule that chooses another format."""


QUANTIZE = Verdict("quantize")


@dataclass(frozen=True, eq=False)
class Policy:
    """What to keep in high precision, what to drop, and why, in one model."""

    about: str
    always: tuple[Rule, ...]
    keep: tuple[Rule, ...]
    drop: tuple[Rule, ...] = ()
    rules: tuple[Rule, ...] = ()
    banks: Patterns = field(default_factory=lambda: Patterns(()))
    keep_outside_blocks: bool = False
    presets: tuple[Preset, ...] = ()
    """Whose rules these are, beside those that hold for every model."""
    _known: dict[str, Verdict] = field(default_factory=dict, init=False, repr=False)

    def verdict(self, module: str) -> Verdict:
        """What becomes of a module, by its name without prefix."""
        if any(rule.patterns.is_numbered(module) for rule in self._numbered):
            return self._decide(module, Patterns.finds)
        kind = skeleton(module)
        if kind not in self._known:
            self._known[kind] = self._decide(kind, Patterns.finds_kind)
        return self._known[kind]

    @cached_property
    def _numbered(self) -> list[Rule]:
        groups = (*self.drop, *self.always, *self.keep, *self.rules)
        return [rule for rule in groups if rule.patterns.has_numbered]

    def _decide(self, module: str, finds: Callable[[Patterns, str], bool]) -> Verdict:
        for rule in self.drop:
            if finds(rule.patterns, module):
                return Verdict("drop", rule.why)
        for rule in (*self.always, *self.keep):
            if finds(rule.patterns, module):
                return Verdict("keep", rule.why, rule.formats)
        found = next((rule for rule in self.rules if finds(rule.patterns, module)), None)
        return QUANTIZE if found is None else Verdict("quantize", found.why, rule=found)

    def drops(self, name: str) -> bool:
        """Whether a tensor, whatever it is, is left out."""
        return bool(self.drop) and self.verdict(name).action == "drop"

    def impossible(self, entry: Entry, done: Collection[str]) -> str | None:
        """Why a tensor can't be quantized, whoever asks; None if it can. ``done``: modules quantized already."""
        if len(entry.shape) < 2 or not entry.name.endswith(SUFFIX):
            bare_bank = len(entry.shape) == 3 and self.banks.finds(entry.name)
            return UNNAMED_BANK if bare_bank else NOT_A_WEIGHT
        module = entry.name.removesuffix(SUFFIX)
        if module in done:
            return "quantized already"
        if entry.dtype not in FLOAT_DTYPES:
            return f"{entry.dtype}"
        is_bank = len(entry.shape) == 3 and self.banks.finds(module)
        if len(entry.shape) != 2 and not is_bank:
            return f"{len(entry.shape)}-D"
        return "empty" if 0 in entry.shape else None

    def refusals(self, entries: Iterable[Entry], prefix: str = "") -> dict[str, str]:
        """For every tensor of a model that is not to be quantized, the reason."""
        entries = list(entries)
        done = quantized_modules(entry.name for entry in entries)
        refused = {}
        for entry in entries:
            why = self.impossible(entry, done)
            if why is None:
                verdict = self.verdict(entry.name.removeprefix(prefix).removesuffix(SUFFIX))
                why = None if verdict.action == "quantize" else verdict.why
            if why is not None:
                refused[entry.name] = why
        candidates = [entry for entry in entries if entry.name not in refused]
        return refused | dict.fromkeys(self.outside(candidates), OUTSIDE)

    def outside(self, candidates: list[Entry], done: Iterable[Entry] = ()) -> set[str]:
        """Names of weights outside of the numbered blocks, where the policy keeps them and blocks hold most weights.

        A numbered block is ``stack.N.part``: a bare ``stack.N`` is an entry of a sequence. One block alone is no stack.
        Weights that are ``done``, quantized already, stand in blocks as others do.
        """
        if not self.keep_outside_blocks:
            return set()
        numbers: dict[str, set[str]] = defaultdict(set)
        stack_of: dict[str, str] = {}
        entries = [*candidates, *done]
        for entry in entries:
            found = re.match(r"(?:(.*?)\.)?(\d+)\..", entry.name.removesuffix(SUFFIX))
            if found:
                stack_of[entry.name] = found[1] or ""
                numbers[found[1] or ""].add(found[2])
        inside = {name for name, stack in stack_of.items() if len(numbers[stack]) > 1}
        weights = {entry.name: math.prod(entry.shape) for entry in entries}
        if 2 * sum(weights[name] for name in inside) < sum(weights.values()):
            return set()
        return {entry.name for entry in candidates} - inside


def quantized_modules(names: Iterable[str]) -> set[str]:
    """Modules whose weight is quantized already."""
    return {name.rpartition(".")[0] for name in names if name.endswith(QUANTIZED_SIBLINGS)}


@cache
def load_policy() -> Policy:
    """The policy for a model that no preset is known of."""
    table = tomllib.loads(resources.files(__package__).joinpath(f"{GENERIC}.toml").read_text(encoding="utf-8"))
    always, keep = (tuple(read_rules(table, kind, GENERIC)) for kind in ("always", "keep"))
    banks = Patterns(table["banks"])
    return Policy(table["about"], always, keep, banks=banks, keep_outside_blocks=table["keep_outside_blocks"])


def policy_of(presets: Collection[Preset]) -> Policy:
    """The policy of some presets together; of none: only what holds for every model is kept."""
    generic = load_policy()
    about = " + ".join(preset.about for preset in presets)
    keep, drop, rules = (
        [rule for preset in presets for rule in getattr(preset, kind)] for kind in ("keep", "drop", "rules")
    )
    rest = tuple(keep), tuple(drop), tuple(rules)
    return Policy(about, generic.always, *rest, banks=generic.banks, presets=tuple(presets))
