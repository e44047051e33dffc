"""Which model a checkpoint holds, and where: told from names and shapes, whatever stands in front of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from lrq.checkpoint.header import Entry
from lrq.models.preset import ANY, ANYWHERE, Identity, Preset, presets

COMPONENTS = (
    "model.diffusion_model.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
    "first_stage_model.",
    "vae.",
    "audio_vae.",
    "vocoder.",
)
"""Starts of the names of an all-in-one checkpoint's parts."""
NEVER_QUANTIZED = ("first_stage_model.", "vae.", "audio_vae.", "vocoder.")
STEM = "model."
"""In front of a language model's names, but not where it was saved without its head, as embedding models are."""
TABLE = "embed_tokens.weight"
"""What tells a language model without that word from a model that has a few layers of its kind."""


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint: all tensors whose names begin with the prefix."""

    prefix: str
    preset: Preset | None
    """None: not recognised."""
    family: str = ""

    @property
    def about(self) -> str:
        """What it is, for people."""
        return "not recognised" if self.preset is None else self.preset.about

    def is_for(self, preset: Preset) -> bool:
        """Whether a preset is for models of this family, or of any."""
        own = self.family if self.preset is None else self.preset.family
        return preset.family in (ANY, self.family, own)


def recognise(entries: Mapping[str, Entry]) -> list[Part]:
    """The models of a checkpoint, recognised or not, in the order of their names; every tensor has one."""
    parts: dict[str, Part] = {}
    for prefix, preset, identity in _claims(entries):
        parts.setdefault(prefix, Part(prefix, preset, identity.family or preset.family))
    prefixes, inner = tuple(parts), tuple(filter(None, parts))
    for name in entries:
        if not name.startswith(prefixes) or (name.startswith(COMPONENTS) and not name.startswith(inner)):
            start = _component(name)
            whole = presets()["vae"] if start in NEVER_QUANTIZED else None
            parts.setdefault(start, Part(start, whole, "vae" if whole else ""))
    return [parts[prefix] for prefix in sorted(parts)]


def claims(entries: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """Prefix and name of every preset that knows a model of the checkpoint, but for models inside of others."""
    return sorted({(prefix, preset.name) for prefix, preset, _ in _claims(entries)})


def assign(parts: list[Part], entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The tensors of every part, by prefix: a tensor belongs to the longest prefix that its name begins with."""
    longest = sorted((part.prefix for part in parts), key=len, reverse=True)
    if longest == [""]:
        return {"": list(entries)}
    assigned: dict[str, list[Entry]] = {prefix: [] for prefix in longest}
    for entry in entries:
        assigned[next(prefix for prefix in longest if entry.name.startswith(prefix))].append(entry)
    return assigned


def _component(name: str) -> str:
    """Start of the names of the all-in-one part that a tensor is of; "" for a file of one model."""
    start = next((start for start in COMPONENTS if name.startswith(start)), "")
    # Several text encoders lie side by side: text_encoders.clip_l.…, conditioner.embedders.0.…
    more = {"text_encoders.": 1, "conditioner.": 2}.get(start, 0)
    rest = name[len(start) :].split(".")[:more]
    return start + "".join(f"{part}." for part in rest)


def _inside(prefix: str, other: str) -> bool:
    """Whether a model's names lie inside of another's, and it is not a part of its own."""
    return prefix != other and prefix.startswith(other) and not _component(prefix[len(other) :])


@cache
def _anchors() -> tuple[dict[str, list[tuple[Preset, Identity]]], tuple[str, ...], tuple[str, ...]]:
    """Identities by their first key, the keys, and those that are the start of a name."""
    table: dict[str, list[tuple[Preset, Identity]]] = {}
    for preset in presets().values():
        for identity in (layout for given in preset.identify for layout in _layouts(given)):
            table.setdefault(identity.keys[0], []).append((preset, identity))
    return table, tuple(key for key in table if key[-1] != "."), tuple(key for key in table if key[-1] == ".")


def _layouts(identity: Identity) -> Iterator[Identity]:
    """An identity, and of a language model that of the same without its head."""
    yield identity
    if identity.keys[0].startswith(STEM):

        def bare(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
            return {key.removeprefix(STEM): shape for key, shape in shapes.items()}

        keys, absent = ([key.removeprefix(STEM) for key in names] for names in (identity.keys, identity.absent))
        shapes, unlike = bare(identity.shapes), tuple(map(bare, identity.unlike))
        yield replace(identity, keys=(*keys, TABLE), absent=tuple(absent), shapes=shapes, unlike=unlike)


def _claims(entries: Mapping[str, Entry]) -> list[tuple[str, Preset, Identity]]:
    """Prefix, preset and identity of what is known; what more keys tell stands first, of equals by name."""
    table, whole, starts = _anchors()
    hits: set[tuple[str, str]] = set()
    for name in entries:
        if name.endswith(whole):
            hits |= {(name.removesuffix(key), key) for key in whole if name.endswith(key)}
        for key in starts:
            if key in name:
                hits.add((name[: name.index(key)], key))
    found = []
    for prefix, key in hits:
        if prefix and not prefix.endswith("."):
            continue
        found += [(prefix, *known) for known in table[key] if _fits(known[1], prefix, entries)]
    prefixes = {prefix for prefix, _, _ in found}
    outer = [claim for claim in found if not any(_inside(claim[0], other) for other in prefixes)]
    return sorted(outer, key=lambda claim: (-len(claim[2].keys), claim[0], claim[1].name))


def _fits(identity: Identity, prefix: str, entries: Mapping[str, Entry]) -> bool:
    def present(key: str) -> bool:
        if key.startswith(ANYWHERE):
            return any(key[1:] in name for name in entries if name.startswith(prefix))
        if key.endswith("."):
            return any(name.startswith(prefix + key) for name in entries)
        return prefix + key in entries

    def shaped(shapes: dict[str, list[int]]) -> bool:
        return all(prefix + key in entries and list(entries[prefix + key].shape) == shapes[key] for key in shapes)

    return (
        all(map(present, identity.keys))
        and not any(map(present, identity.absent))
        and shaped(identity.shapes)
        and not any(shaped(other) for other in identity.unlike)
    )
