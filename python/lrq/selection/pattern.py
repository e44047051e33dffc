"""What can be told of a regular expression without running it: how specific it is, and what a name must hold."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

Node = tuple[Any, Any]
Needles = tuple[tuple[str, ...], ...]
"""Of every group one, at least, is part of each name that an expression finds."""

_PROPERTY = re.compile(r"\\[pP]\{[^{}]*\}|\\.", re.DOTALL)
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)
_DIGITS = [(op.IN, [(op.CATEGORY, op.CATEGORY_DIGIT)])]
_STARTS, _ENDS = (op.AT_BEGINNING, op.AT_BEGINNING_STRING), (op.AT_END, op.AT_END_STRING)
_DOT: Node = (op.LITERAL, ord("."))


@dataclass(frozen=True)
class Pattern:
    """An expression in parts."""

    literals: int
    """Characters that every name it finds has to spell out: of ``a|b`` those of the shorter branch."""
    needles: Needles = ()
    whole: str = ""
    """The one name that it finds, where it is nothing but that between a start and an end."""
    of_kinds: bool = False
    """Whether it finds all names that differ in nothing but whole numbers between dots, or none of them."""


def read(text: str) -> Pattern:
    """The parts of an expression; of one that only the ``regex`` module reads, or reads in another way, nothing."""
    text = _PROPERTY.sub(lambda found: r"\w" if len(found[0]) > 2 else found[0], text)
    try:
        with warnings.catch_warnings():
            # What Python warns of, sets in sets, the other module takes for such.
            warnings.simplefilter("error")
            parsed = _parser.parse(text)
    except (re.error, Warning, RecursionError, OverflowError):
        return Pattern(0)
    # Braces that Python takes for themselves may be the other's fuzzy matching.
    if "{" in re.sub(r"\\.|\{\d*,?\d*\}", "", text, flags=re.DOTALL):
        return Pattern(0)
    nodes, flags = list(parsed), parsed.state.flags
    return Pattern(
        _literals_of(nodes),
        () if flags & re.IGNORECASE else _needles_of(nodes),
        "" if flags & (re.IGNORECASE | re.MULTILINE) else _whole(nodes),
        not flags & re.ASCII and _are_of_kinds(nodes),
    )


def _literals_of(nodes: Iterable[Node]) -> int:
    return sum(map(_literals, nodes))


def _literals(node: Node) -> int:
    kind, value = node
    if kind is op.LITERAL:
        return 1
    if kind is op.IN:
        return int(all(member[0] is op.LITERAL for member in value))
    if kind is op.BRANCH:
        return min(map(_literals_of, value[1]))
    if kind in _REPEATS:
        return int(value[0]) * _literals_of(value[2])
    if kind is op.GROUPREF_EXISTS:
        return min(_literals_of(value[1]), _literals_of(value[2] or ()))
    if kind is op.SUBPATTERN:
        return _literals_of(value[-1])
    return _literals_of(value) if kind is op.ATOMIC_GROUP else 0


def _needles_of(nodes: Iterable[Node]) -> Needles:
    found: list[tuple[str, ...]] = []
    run = ""
    for kind, value in [*nodes, (None, None)]:
        if kind is op.LITERAL:
            run += chr(value)
            continue
        found += [(run,)] if run else []
        run = ""
        if kind is op.SUBPATTERN and not value[1]:
            found += _needles_of(value[-1])
        elif kind is op.BRANCH:
            branches = [_needles_of(branch) for branch in value[1]]
            if all(branches):
                found.append(tuple(one for branch in branches for one in max(branch, key=lambda o: min(map(len, o)))))
    return tuple(found)


def _whole(nodes: Sequence[Node]) -> str:
    inner = nodes[1:-1]
    ends = len(nodes) > 2 and nodes[0] == (op.AT, op.AT_BEGINNING) and nodes[-1] == (op.AT, op.AT_END)
    return "".join(chr(value) for _, value in inner) if ends and all(kind is op.LITERAL for kind, _ in inner) else ""


def _are_of_kinds(nodes: Sequence[Node], inner: bool = False) -> bool:
    """No part tells one number from another, or counts digits.

    ``\\d+`` between dots takes a number whole, ``.*`` all that stands between other parts.
    """
    edge: Node | None = None if inner else (op.AT, None)
    around = [edge, *nodes, edge]
    return all(_is_of_kinds(*around[i : i + 3]) for i in range(len(nodes)))  # type: ignore[arg-type]


def _is_of_kinds(before: Node | None, node: Node, after: Node | None) -> bool:
    kind, value = node
    if kind is op.LITERAL:
        return not chr(value).isdigit()
    if kind is op.IN:
        return all(member[0] is op.LITERAL and not chr(member[1]).isdigit() for member in value)
    if kind is op.AT:
        return value in (*_STARTS, *_ENDS)
    if kind is op.SUBPATTERN:
        return not value[1] and _are_of_kinds(value[-1], True)
    if kind is op.BRANCH:
        return all(_are_of_kinds(branch, True) for branch in value[1])
    if kind not in (op.MAX_REPEAT, op.MIN_REPEAT):
        return False
    least, most, body = value
    endless = most is op.MAXREPEAT and least <= 1
    if list(body) == _DIGITS:
        return endless and least == 1 and _bounds(before) and _bounds(after)
    if list(body) == [(op.ANY, None)]:
        return endless and all(near is not None and near[0] in (op.LITERAL, op.AT) for near in (before, after))
    return _are_of_kinds(body, True)


def _bounds(near: Node | None) -> bool:
    return near is not None and (near == _DOT or near[0] is op.AT)
