"""The user's rules together: exact names, --exclude_layers, --custom_layers and --layer_config."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping

from lrq.checkpoint.header import Entry
from lrq.config import Conversion, Storage
from lrq.errors import InputError, printable
from lrq.models.policy import SUFFIX
from lrq.selection.expression import Expression, Names
from lrq.selection.layer_config import LayerRule, Table, read_rules
from lrq.selection.storage import Choice, SpecError, choice_of, read_spec

EXCLUDED = "excluded by --exclude_layers"


class UserRules:
    """What the user says of single layers.

    Raises:
        InputError: a rule that is wrong in itself.
    """

    def __init__(self, conversion: Conversion, entries: Mapping[str, Entry]) -> None:
        selection, storage = conversion.selection, conversion.storage
        self._exact = {name: _read_exact(name, spec, storage) for name, spec in (selection.layers or {}).items()}
        missing = next((name for name in self._exact if f"{name}{SUFFIX}" not in entries), None)
        if missing is not None:
            raise InputError(f"layer {printable(missing)}: is not in the checkpoint; the plan is of another")
        self._excluded = Choice(None, EXCLUDED)
        self._rules, self.default = self._read(conversion)
        self._names = Names(name.removesuffix(SUFFIX) for name in entries if name.endswith(SUFFIX))
        self._first: dict[str, LayerRule] = {}
        """The rule that decides on a module, of those that find it."""
        for rule in self._rules:
            rule.names = rule.expression.among(self._names)
            for name in rule.names:
                self._first.setdefault(name, rule)
        self._useless: dict[str, str] = {}
        """Why what is asked for can't be done, by module."""
        self._judged: set[str] = set()

    def _read(self, conversion: Conversion) -> tuple[list[LayerRule], Choice | None]:
        """The rules, the one that wins first, and the one for layers that none finds."""
        selection, storage, fullmatch = conversion.selection, conversion.storage, conversion.selection.fullmatch
        rules: list[LayerRule] = []

        def add(flag: str, texts: tuple[str, ...], choice: Choice) -> None:
            expressions = [Expression(text, f"{flag} {printable(text)}", fullmatch) for text in texts]
            rules.extend(LayerRule(expression, choice) for expression in expressions)

        add("--exclude_layers", selection.exclude_layers, self._excluded)
        if selection.custom_layers:
            custom = choice_of(str(selection.custom_type), "--custom_type", "--custom_layers")
            add("--custom_layers", selection.custom_layers, custom)
        table = selection.layer_config or {}
        path, lines = (table.path, table.lines) if isinstance(table, Table) else ("", None)
        config, default = read_rules(table, storage, fullmatch, path, lines)
        # The more of a name a pattern spells out, the more specific it is; of equals the later one wins.
        rules += sorted(reversed(config), key=lambda rule: -rule.expression.literals)
        return rules, default

    def choice(self, name: str) -> Choice | None:
        """What the first rule that finds a layer makes of it; None where none does."""
        self._judged.add(name)
        if name in self._exact:
            return self._exact[name]
        return self._first[name].choice if name in self._first else None

    def excludes(self, choice: Choice) -> bool:
        """Whether the choice is that of --exclude_layers."""
        return choice is self._excluded

    def note_useless(self, name: str, why: str) -> None:
        """Tell the rules of a layer that what they ask for can't be done.

        Raises:
            InputError: the layer is asked for by its name.
        """
        exact = self._exact.get(name)
        if exact is not None and not exact.stays:
            raise InputError(
                f"layer {printable(name)} ({printable(exact.why)}): can't be quantized so: {printable(why)}; choose "
                'another format, or {"skip": true} for it to stay as it is'
            )
        self._useless[name] = why

    def refuse_left_out(self, name: str, why: str) -> None:
        """Raise :class:`InputError` for a module that is asked for by its name, and that a preset drops."""
        if name in self._exact:
            raise InputError(f"layer {printable(name)} ({printable(self._exact[name].why)}): is left out: {why}")

    def check(self, where: str) -> None:
        """Raise :class:`InputError` for a rule that found nothing, or nothing that can be done."""
        for rule in self._rules:
            if any(name in self._judged and not self._fails(rule, name) for name in rule.names):
                continue
            useless = sorted({self._useless[name] for name in rule.names if name in self._useless})
            if useless and rule.choice.stays:
                continue
            if useless:
                raise InputError(
                    f"{rule.expression.where}: finds only weights that can't be quantized so ({'; '.join(useless)})"
                )
            near = difflib.get_close_matches(rule.expression.text.replace("\\", ""), self._nearby(), 1, 0.4)
            hint = f"; the nearest name is {printable(near[0])}" if near else ""
            kind = "layer to exclude" if rule.choice is self._excluded else "layer"
            raise InputError(f"{rule.expression.where}: finds no {kind} in {where}{hint}")

    def _fails(self, rule: LayerRule, name: str) -> bool:
        return self._first[name] is rule and name in self._useless

    def outdone(self) -> Iterator[str]:
        """Rules without effect, one line each: others decide otherwise on every layer that they find."""
        for rule in self._rules:
            names = [name for name in rule.names if name in self._judged]
            winners = Counter(self._first[name] for name in names)
            others = [other for other in winners if not _alike(other.choice, rule.choice)]
            if rule in winners or not others:
                continue
            first = max(others, key=lambda other: winners[other])
            more = f" and {len(winners) - 1} more" if len(winners) > 1 else ""
            winner = f"{first.expression.where}{more}"
            yield f"{rule.expression.where} has no effect: {winner} comes first on every layer that it finds"

    def _nearby(self) -> list[str]:
        """Names to compare with: of each kind of layer the first, whole and in its last parts."""
        first: dict[str, str] = {}
        for name in self._names.all:
            first.setdefault("".join(c for c in name if not c.isdigit()), name)
        names = list(first.values())[:2000]
        return [*names, *{".".join(name.split(".")[-2:]) for name in names}, *{name.split(".")[-1] for name in names}]


def _read_exact(name: str, spec: object, storage: Storage) -> Choice:
    try:
        why = str(spec.get("_why", "plan")) if isinstance(spec, dict) else "plan"
        return read_spec(spec, storage, why)
    except SpecError as error:
        raise InputError(f"layer {printable(name)}: {error}") from None


def _alike(a: Choice, b: Choice) -> bool:
    return (a.storage, a.simple, a.bfloat16) == (b.storage, b.simple, b.bfloat16)
