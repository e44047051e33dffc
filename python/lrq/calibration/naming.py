"""Names of modules and keys of checkpoints that mean the same layer: equal, or apart by one prefix."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from lrq.errors import counted, printable

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
"""Layers of an expert, as most checkpoints call them."""
SPELLINGS = ((GATE, UP, DOWN), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2"))
"""How checkpoints call gate, up and down."""
GATE_UP = "gate_up_proj"
"""Gate and up of all experts in one tensor."""


@dataclass(frozen=True)
class PrefixRule:
    """``name`` without ``strip`` and with ``add`` before it."""

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str | None:
        """The other name, or None where the rule does not hold."""
        return self.add + name[len(self.strip) :] if name.startswith(self.strip) else None

    def __str__(self) -> str:
        parts = [
            f"{word} {printable(prefix)}" for word, prefix in (("without", self.strip), ("with", self.add)) if prefix
        ]
        return " and ".join(parts) or "as they are"


def prefix_rule(names: Collection[str], keys: Collection[str]) -> PrefixRule:
    """The rule under which most names are keys; names as they are where no other finds more."""
    found = Counter({PrefixRule(): len(set(names) & set(keys))})
    known, wanted = frozenset(names), frozenset(keys)
    for key in wanted:
        found.update(PrefixRule("", prefix) for prefix, tail in _cuts(key) if tail in known)
    for name in known:
        found.update(PrefixRule(prefix, "") for prefix, tail in _cuts(name) if tail in wanted)
    return max(found, key=lambda rule: (found[rule], -len(rule.strip + rule.add), rule.add))


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Every prefix that ends in a dot, and what follows it."""
    place = name.find(".") + 1
    while place:
        yield name[:place], name[place:]
        place = name.find(".", place) + 1


def match_names(names: Collection[str], keys: Collection[str]) -> tuple[dict[str, str], str]:
    """Name by key, and one line on how they were matched; empty where all that match are equal."""
    rule = prefix_rule(names, keys)
    matched = {key: name for name in names if (key := rule(name)) is not None and key in keys}
    if rule == PrefixRule():
        return matched, ""
    return matched, f"names were matched {rule} ({counted(len(matched), 'layer')})"


def expert_layers(count: int, gated: bool) -> list[str]:
    """Layers of a module of experts, one by one: ``0.gate_proj``, ``0.up_proj``, ``0.down_proj``, ``1.…``"""
    return [f"{expert}.{role}" for expert in range(count) for role in ((GATE, UP, DOWN) if gated else (UP, DOWN))]


def fused_layers(gated: bool) -> list[str]:
    """Layers of a module of experts, all experts together."""
    return [GATE_UP if gated else UP, DOWN]


def match_experts(
    modules: Mapping[str, tuple[int, bool]], keys: Collection[str], rule: PrefixRule
) -> dict[str, dict[str, str]]:
    """Keys of the layers of modules of experts: ``mlp.experts.3.up_proj`` may be ``block_sparse_moe.experts.3.w3``.

    Experts are looked for under the module's own name by the rule; one by one also where the numbers in the name are
    the same, as of the block, the number of experts is, and nothing else is there that could be meant.

    Args:
        modules: number of experts and whether they have a gate, by name.
        keys: of the checkpoint, without ``.weight``.

    Returns:
        Keys by layer, by module: of :func:`expert_layers`, or of :func:`fused_layers` where the checkpoint has all
        experts in one tensor; none where it has no such layers.
    """
    experts = defaultdict[str, dict[int, set[str]]](lambda: defaultdict(set))
    for key in keys:
        if one := re.fullmatch(r"(.+)\.(\d+)\.(\w+)", key):
            experts[one[1]][int(one[2])].add(one[3])
    near = defaultdict[tuple[str, ...], list[str]](list)
    for place in experts:
        near[_numbers(place)].append(place)
    rivals = Counter(map(_numbers, modules))
    matched: dict[str, dict[str, str]] = {}
    for name, (count, gated) in modules.items():
        own = rule(name) or name
        fused = {layer: f"{own}.{layer}" for layer in fused_layers(gated)}
        others = [_one_by_one(place, experts[place], count, gated) for place in near[_numbers(own)]]
        others = [one for one in others if one]
        matched[name] = _one_by_one(own, experts.get(own, {}), count, gated)
        if not matched[name] and all(key in keys for key in fused.values()):
            matched[name] = fused
        if not matched[name] and len(others) == 1 and rivals[_numbers(name)] == 1:
            (matched[name],) = others
    return matched


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdecimal())


def _one_by_one(place: str, experts: Mapping[int, set[str]], count: int, gated: bool) -> dict[str, str]:
    """Keys by layer, where the layers at a place are those of so many experts; empty where not."""
    if experts.keys() != set(range(count)):
        return {}
    for spelling in SPELLINGS:
        if all(set(spelling if gated else spelling[1:]) <= layers for layers in experts.values()):
            known = dict(zip((GATE, UP, DOWN), spelling, strict=True))
            parts = (layer.split(".") for layer in expert_layers(count, gated))
            return {f"{expert}.{role}": f"{place}.{expert}.{known[role]}" for expert, role in parts}
    return {}
