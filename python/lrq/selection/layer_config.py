"""The user's rules: a JSON file that gives layers formats by regular expression."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrq.config import Storage
from lrq.errors import InputError, printable
from lrq.selection.expression import Expression
from lrq.selection.storage import FORMAT_KEYS, Choice, SpecError, read_spec

DEFAULT = "_default"
"""The rule for layers that no other finds."""
Lines = dict[tuple[str, ...], tuple[int, bool]]
"""Line of a key, and whether it is given twice."""


class Table(dict):
    """The rules of a file; it knows where they stand."""

    path: str = ""
    lines: Lines | None = None


class LayerRule:
    """One entry: an expression and what it makes of the layers that it finds."""

    def __init__(self, expression: Expression, choice: Choice) -> None:
        self.expression, self.choice = expression, choice
        self.names: list[str] = []
        """Modules that it finds."""


def load_table(path: str | os.PathLike[str], base: Storage) -> Table:
    """The rules of a file, checked; ``base`` is the storage of a rule that names no format.

    Raises:
        InputError: naming the line, the key and the nearest valid name.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"--layer_config {path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--layer_config {path}: not a text file in UTF-8") from None
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--layer_config {path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"--layer_config {path}: not JSON: {printable(str(error))}") from None
    lines = dict(_lines(text)) if isinstance(table, dict) else {}
    read_rules(table, base, False, str(path), lines)
    twice = [key for key in lines if lines[key][1]]
    if twice:
        line = lines[twice[0]][0]
        raise InputError(f"--layer_config {path}: line {line}: {printable('.'.join(twice[0]))!r} is given twice")
    rules = Table(table)
    rules.path, rules.lines = str(path), lines
    return rules


def read_rules(
    table: Any,
    base: Storage,
    fullmatch: bool,
    path: str = "",
    lines: Lines | None = None,
) -> tuple[list[LayerRule], Choice | None]:
    """The rules of a table, in its order, and the one for layers that none finds.

    Raises:
        InputError: an expression that does not compile, an unknown key or format, a value of the wrong type.
    """
    prefix = f"--layer_config {path}".strip()
    if not isinstance(table, dict):
        raise InputError(f'{prefix}: must be a JSON object such as {{"attn": {{"format": "fp8"}}}}')
    rules, default = [], None
    for key, spec in table.items():
        where = f"{prefix}: {_line(lines, (key,))}{printable(key)!r}"
        if key.startswith("_") and key != DEFAULT:
            if _like_default(key):
                raise InputError(f"{where}: is no comment's name; did you mean {DEFAULT}?")
            continue
        try:
            choice = read_spec(spec, base, f"--layer_config {printable(key)}")
        except SpecError as error:
            at = _line(lines, (key, error.key)) or _line(lines, (key,))
            raise InputError(f"{prefix}: {at}{printable(key)!r}: {error}") from None
        if key == DEFAULT:
            # One that says nothing of the format leaves it to the run.
            default = choice if spec.keys() & {"skip", *FORMAT_KEYS} else replace(choice, why="")
        else:
            rules.append(LayerRule(Expression(key, where, fullmatch), choice))
    return rules, default


def _like_default(key: str) -> bool:
    """Whether a key is ``_default`` in another case or spelling."""
    letters = "".join(filter(str.isalpha, key)).casefold()
    return bool(difflib.get_close_matches(letters, (DEFAULT.strip("_"),), cutoff=0.8))


def _line(lines: Lines | None, keys: tuple[str, ...]) -> str:
    return f"line {lines[keys][0]}: " if lines and keys in lines else ""


def _lines(text: str) -> Iterator[tuple[tuple[str, ...], tuple[int, bool]]]:
    """Line of every key of a valid JSON object and of the objects in it, and whether it is given twice."""
    seen: set[tuple[str, ...]] = set()
    for keys, position in _keys(text, text.index("{"), ()):
        yield keys, (text.count("\n", 0, position) + 1, keys in seen)
        seen.add(keys)


def _keys(text: str, start: int, outer: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    decoder, position = json.JSONDecoder(), _skip(text, start + 1)
    while text[position] != "}":
        key, end = decoder.raw_decode(text, position)
        yield (*outer, key), position
        value = _skip(text, _skip(text, end) + 1)
        if text[value] == "{" and not outer:
            yield from _keys(text, value, (key,))
        position = _skip(text, decoder.raw_decode(text, value)[1])
        if text[position] == ",":
            position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position
