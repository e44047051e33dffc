"""The decision on every tensor: who says what, and who wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lrq.checkpoint.header import Entry
from lrq.config import Conversion, Storage
from lrq.formats import Format, Shape, bfloat16
from lrq.models.policy import OUTSIDE, QUANTIZE, SUFFIX, Policy, Verdict, quantized_modules
from lrq.models.recognition import Part, assign, recognise
from lrq.selection.heuristics import unsuitable
from lrq.selection.layer import Layer
from lrq.selection.policies import choose_policies
from lrq.selection.rules import UserRules
from lrq.selection.storage import Choice, choice_of, choose_format, storage_of


@dataclass
class Decisions:
    """What becomes of every tensor of a checkpoint."""

    parts: list[Part]
    policies: dict[str, Policy]
    """By prefix of the part."""
    layers: list[Layer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Reason by tensor, for those that stay as they are."""
    bfloat16: dict[str, str] = field(default_factory=dict)
    """Reason by tensor, for those that are stored in bfloat16."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reason by tensor, for weights whose shape the format can't take."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Reason by tensor, for those that are left out."""
    outdone: tuple[str, ...] = ()
    """Rules of the user's that have no effect, one line each."""


def decide(entries: Mapping[str, Entry], conversion: Conversion, where: str) -> Decisions:
    """Decide on every tensor of a checkpoint; ``where`` names it in errors.

    Above all stand the exact names of ``layers``, then --exclude_layers, --custom_layers and the expressions of
    --layer_config. Where none of them speaks presets say what stays, then --heur; what is left has the format of
    ``_default``, or the run's own, but where a preset's rule replaces that.

    Raises:
        InputError: a rule that is wrong, finds nothing, or asks for what can't be done.
    """
    parts = recognise(entries)
    tensors = assign(parts, entries.values())
    policies = choose_policies(parts, tensors, conversion.selection.preset, where)
    # What stands beside a model, a scalar or a table of numbers, is no model that could be recognised.
    shown = [part for part in parts if part.preset or any(len(entry.shape) > 1 for entry in tensors[part.prefix])]
    decisions = Decisions(shown, policies)
    rules = UserRules(conversion, entries)
    fallback = conversion.selection.fallback
    judge = _Judge(conversion, rules, None if fallback is None else choice_of(fallback, "--fallback", ""))
    done = quantized_modules(entries)
    for part in parts:
        _decide_part(part, tensors[part.prefix], policies[part.prefix], judge, done, decisions)
    rules.check(where)
    decisions.outdone = tuple(rules.outdone())
    return decisions


def _decide_part(
    part: Part, tensors: list[Entry], policy: Policy, judge: _Judge, done: set[str], decisions: Decisions
) -> None:
    start = len(part.prefix)
    possible: list[tuple[Entry, Verdict]] = []
    for entry in tensors:
        if policy.drop and policy.drops(entry.name[start:]):
            decisions.dropped[entry.name] = policy.verdict(entry.name[start:]).why
            judge.rules.refuse_left_out(entry.name.removesuffix(SUFFIX), decisions.dropped[entry.name])
            continue
        why = policy.impossible(entry, done)
        if why is None:
            possible.append((entry, policy.verdict(entry.name[start : -len(SUFFIX)])))
        else:
            decisions.kept[entry.name] = why
            if entry.name.endswith(SUFFIX):
                judge.rules.note_useless(entry.name[: -len(SUFFIX)], why)
    outside: set[str] = set()
    if policy.keep_outside_blocks:
        before = [entry for entry in tensors if entry.name.endswith(SUFFIX) and entry.name[: -len(SUFFIX)] in done]
        outside = policy.outside([entry for entry, verdict in possible if verdict.action == "quantize"], before)
    for entry, verdict in possible:
        judge.judge(entry, Verdict("keep", OUTSIDE) if entry.name in outside else verdict, decisions)


class _Judge:
    def __init__(self, conversion: Conversion, rules: UserRules, fallback: Choice | None) -> None:
        self.rules, self.fallback = rules, fallback
        self.heur = conversion.selection.heur
        self.default = rules.default or Choice(conversion.storage, "")
        self._formats: dict[tuple[int, Shape], Format | str] = {}
        self._of_presets: dict[int, Choice] = {}

    def judge(self, entry: Entry, verdict: Verdict, decisions: Decisions) -> None:
        """Record what becomes of a weight that could be quantized."""
        name = entry.name[: -len(SUFFIX)]
        asked = self.rules.choice(name)
        choice, why_not = (asked, "") if asked is not None else self._by_policy(verdict)
        if choice is not None and choice.storage is None and self.rules.excludes(choice):
            choice, why_not = self._fall_back(verdict, choice.why)
        if choice is None or choice.stays:
            decisions.kept[entry.name] = why_not if choice is None else choice.why
            return
        if choice.storage is None:
            if entry.dtype in bfloat16.WIDER:
                decisions.bfloat16[entry.name] = choice.why
            else:
                decisions.kept[entry.name] = f"{choice.why}: {entry.dtype} already"
            return
        fmt = self._format(choice.storage, entry.shape)
        if isinstance(fmt, str):
            if asked is not None:
                self.rules.note_useless(name, fmt)
            decisions.refused[entry.name] = fmt
            return
        if verdict.formats is not None and fmt.name not in verdict.formats:
            if asked is not None:
                self.rules.note_useless(name, f"{verdict.why}, which {_allowed(verdict.formats)}")
            decisions.kept[entry.name] = verdict.why
            return
        if asked is None and self.heur and (reason := unsuitable(fmt, entry.shape)) is not None:
            decisions.kept[entry.name] = reason
            return
        full_precision = choice.storage.full_precision_matrix_mult
        decisions.layers.append(Layer(name, entry, fmt, choice.why, choice.simple, asked is not None, full_precision))

    def _format(self, storage: Storage, shape: Shape) -> Format | str:
        # By identity: to hash a configuration takes longer than all else that is done for a layer.
        kind = id(storage), shape
        found = self._formats.get(kind)
        if found is None:
            found = self._formats[kind] = choose_format(storage, shape)
        return found

    def _by_policy(self, verdict: Verdict) -> tuple[Choice | None, str]:
        if verdict is QUANTIZE:
            return self.default, ""
        if verdict.action == "keep":
            return self._fall_back(verdict, verdict.why)
        rule, usual = verdict.rule, self.default.storage
        if rule is None or usual is None or usual.family not in rule.when:
            return self.default, ""
        if id(rule) not in self._of_presets:
            storage = storage_of(rule.format, rule.why)
            storage = replace(storage, full_precision_matrix_mult=usual.full_precision_matrix_mult)
            self._of_presets[id(rule)] = Choice(storage, rule.why, self.default.simple)
        return self._of_presets[id(rule)], ""

    def _fall_back(self, verdict: Verdict, why: str) -> tuple[Choice | None, str]:
        if self.fallback is None:
            return None, why
        # Every loader reads an embedding in 16 bits; norms and tables keep what they have unless they are named.
        plain = self.fallback.bfloat16 and verdict.formats != ()
        if verdict.formats is not None and not plain:
            return None, why
        return replace(self.fallback, why=f"--fallback: {why}"), ""


def _allowed(formats: tuple[str, ...]) -> str:
    return f"can only be {' or '.join(formats)}" if formats else "can't be quantized"
