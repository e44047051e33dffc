"""The user's rules together: exact names, --exclude_layers, --custom-layers and --layer-config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from lrq.checkpoint.header import Entry
from lrq.config import Conversion
from lrq.errors import InputError, printable
from lrq.models.policy import SUFFIX
from lrq.selection.expression import Expression
from lrq.selection.layer_config import LayerRule, Table, read_rules
from lrq.selection.storage import Choice, SpecError, read_spec, storage_of

EXCLUDED = "excluded by --exclude_layers"


class UserRules:
    """What the user says of single layers.

    Raises:
        InputError: a rule that is wrong in itself.
    """

    def __init__(self, conversion: Conversion, entries: Mapping[str, Entry]) -> None:
        selection, storage = conversion.selection, conversion.storage
        self._exact = {name: self._read_exact(name, spec, storage) for name, spec in (selection.layers or {}).items()}
        missing = next((name for name in self._exact if f"{name}{SUFFIX}" not in entries), None)
        if missing is not None:
            raise InputError(f"layer {printable(missing)}: is not in the checkpoint; the plan is of another")
        self._names = entries.keys()
        self._fullmatch = selection.fullmatch
        self._ordered: list[LayerRule] = []
        self._excluded: Choice | None = None
        if selection.exclude_layers is not None:
            self._excluded = Choice(None, EXCLUDED)
            self._add("--exclude_layers", selection.exclude_layers, self._excluded)
        if selection.custom_layers is not None:
            custom = storage_of(str(selection.custom_type), "--custom-type")
            self._add("--custom-layers", selection.custom_layers, Choice(custom, "--custom-layers"))
        table = selection.layer_config or {}
        path, lines = (table.path, table.lines) if isinstance(table, Table) else ("", None)
        config, self.default = read_rules(table, storage, self._fullmatch, path, lines)
        # The more of a name a pattern spells out, the more specific it is; of equals the later one wins.
        self._ordered += sorted(reversed(config), key=lambda rule: -rule.expression.literals)
        self._winner: dict[str, LayerRule] = {}

    @staticmethod
    def _read_exact(name: str, spec: object, storage: object) -> Choice:
        try:
            why = str(spec.get("_why", "plan")) if isinstance(spec, dict) else "plan"
            return read_spec(spec, storage, why)  # type: ignore[arg-type]
        except SpecError as error:
            raise InputError(f"layer {printable(name)}: {error}") from None

    def _add(self, flag: str, text: str, choice: Choice) -> None:
        self._ordered.append(LayerRule(Expression(text, f"{flag} {printable(text)}", self._fullmatch), choice))

    @property
    def any(self) -> bool:
        """Whether there is a rule for single layers."""
        return bool(self._ordered or self._exact)

    def choice(self, name: str) -> Choice | None:
        """What the first rule that finds a layer makes of it; None where none does."""
        winner = None
        for rule in self._ordered:
            if rule.expression.finds(name):
                rule.found += 1
                winner = winner or rule
        if name in self._exact:
            return self._exact[name]
        if winner is None:
            return None
        self._winner[name] = winner
        return winner.choice

    def excludes(self, choice: Choice) -> bool:
        """Whether the choice is that of --exclude_layers."""
        return choice is self._excluded

    def note_impossible(self, entry: Entry, why: str) -> None:
        """Tell the rules that find this tensor that it can't be quantized."""
        if not entry.name.endswith(SUFFIX):
            return
        for rule in self._ordered:
            if rule.expression.finds(entry.name[: -len(SUFFIX)]):
                rule.useless.add(why)

    def note_useless(self, name: str, why: str) -> None:
        """Tell the rule of a layer that what it asks for can't be done."""
        if name in self._winner:
            self._winner[name].found -= 1
            self._winner[name].useless.add(why)

    def note_used(self, name: str) -> None:
        """Forget who won: the layer is as its rule wants it."""
        self._winner.pop(name, None)

    def check(self, where: str) -> None:
        """Raise :class:`InputError` for a rule that found nothing, or nothing that can be done."""
        for rule in self._ordered:
            if rule.found or (rule.choice.storage is None and rule.useless):
                continue
            if rule.useless:
                raise InputError(
                    f"{rule.expression.where}: finds only weights that can't be quantized so "
                    f"({'; '.join(sorted(rule.useless))})"
                )
            near = difflib.get_close_matches(rule.expression.text.replace("\\", ""), self._nearby(), 1, 0.4)
            hint = f"; the nearest name is {printable(near[0])}" if near else ""
            kind = "layer to exclude" if rule.choice is self._excluded else "layer"
            raise InputError(f"{rule.expression.where}: finds no {kind} in {where}{hint}")

    def _nearby(self) -> list[str]:
        """Names to compare with: of each kind of layer the first, whole and in its last parts."""
        first: dict[str, str] = {}
        for name in (name.removesuffix(SUFFIX) for name in self._names if name.endswith(SUFFIX)):
            first.setdefault("".join(c for c in name if not c.isdigit()), name)
        names = list(first.values())[:2000]
        return [*names, *{".".join(name.split(".")[-2:]) for name in names}, *{name.split(".")[-1] for name in names}]
