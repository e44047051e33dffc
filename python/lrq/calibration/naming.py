"""Names of modules and keys of checkpoints that mean the same layer: equal, or apart by one prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from lrq.errors import counted, printable


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
