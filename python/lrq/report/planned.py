"""A plan as a document: to read, to edit and to give back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lrq.checkpoint.header import BITS, Entry, paused_collection
from lrq.checkpoint.layout import Layout
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.dialects import comfyui
from lrq.errors import InputError, RepeatedKeyError, listed, printable, unique_keys
from lrq.estimate import Estimate
from lrq.formats import bfloat16
from lrq.measure import Budget
from lrq.models.patterns import skeleton
from lrq.models.policy import SUFFIX
from lrq.plan import Plan
from lrq.report.notices import notices
from lrq.selection.decide import Decisions, decide
from lrq.selection.storage import spec_of
from lrq_kernels._version import __version__

KIND = "lrq_plan"
"""Key, and with it the version of the layout, of a plan file."""
DEFAULT_WHY = "the run's format"


def decisions(made: Plan | Decisions, entries: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """Rule by layer, as in a layer-config: what is quantized, and the matrices that stay as they are."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    table = {}
    for layer in made.layers:
        kind = layer.format, layer.full_precision, layer.simple, layer.why
        if kind not in known:
            known[kind] = {**spec_of(*kind[:3]), "_why": layer.why or DEFAULT_WHY}
        table[layer.name] = known[kind]
    for entry in entries.values():
        if entry.name in made.bfloat16:
            spec = {"format": bfloat16.NAME, "_why": made.bfloat16[entry.name]}
            table[entry.name.removesuffix(SUFFIX)] = spec
        why = made.refused.get(entry.name) or made.kept.get(entry.name)
        if why and entry.name.endswith(SUFFIX) and len(entry.shape) in (2, 3) and not _never(why, entry.dtype):
            table[entry.name.removesuffix(SUFFIX)] = {"skip": True, "_why": why}
    return table


def _never(why: str, dtype: str) -> bool:
    return why in (dtype, "quantized already", "3-D", "empty")


def bits_per_weight(plan: Plan) -> tuple[float, float]:
    """Bits of an element: of the quantized layers with their scales, and of the whole model."""
    weights = sum(math.prod(layer.source.shape) for layer in plan.layers)
    biases = [f"{layer.name}.{comfyui.BIAS}" for layer in plan.layers if layer.corrects is not None]
    known = {entry.name: entry for entry in plan.header.entries} if biases or plan.bfloat16 else {}
    as_they_are = [*(known.get(e.name, e) for e in plan.copied), *(known[name] for name in biases)]
    stored = plan.header.data_size - sum(entry.size for entry in as_they_are)
    elements = weights + sum(entry.size * 8 // BITS[entry.dtype] for entry in as_they_are)
    return 8 * stored / max(weights, 1), 8 * plan.header.data_size / max(elements, 1)


def formats(plan: Plan) -> Counter[str]:
    """Layers by format, those in bfloat16 as well."""
    found = Counter(layer.format.name for layer in plan.layers)
    return found + Counter({bfloat16.NAME: len(plan.bfloat16)})


def document(
    source: Reader,
    plan: Plan,
    layout: Layout,
    conversion: Conversion,
    needs: Estimate,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Everything that the plan says, for JSON."""
    quantized_bits, bits = bits_per_weight(plan)
    slow = slow_layers(plan)
    return {
        KIND: 1,
        "version": __version__,
        "source": {"name": source.path.name, "size": source.size, "header_sha256": source.header_sha256},
        "models": models(plan),
        "output_bytes": layout.size,
        **({} if layout.index is None else {"output_files": files(layout)}),
        "bits_per_weight": round(bits, 4),
        "bits_per_quantized_weight": round(quantized_bits, 4),
        "formats": dict(formats(plan)),
        "low_precision_matmul": {"layers": len(plan.layers) - len(slow), "of": len(plan.layers), "not": slow},
        "estimate": {
            "host_peak_bytes": needs.host_bytes,
            "gpu_peak_bytes": needs.gpu_bytes,
            "seconds": round(needs.seconds, 3),
        },
        **({} if budget is None else {"budget": dataclasses.asdict(budget)}),
        "notices": notices(plan, conversion),
        "kept": dict(Counter({**plan.kept, **plan.refused}.values())),
        "dropped": dict(Counter(plan.why_dropped.values())),
        "settings": conversion.settings(),
        "layers": decisions(plan, source.entries),
    }


def files(layout: Layout) -> dict[str, int]:
    """Bytes by name, of shards and of their index."""
    index = {} if layout.index is None else {layout.target.name: len(layout.index)}
    return {file.path.name: file.size for file in layout.files} | index


def models(plan: Plan) -> list[dict[str, Any]]:
    """The models of the checkpoint: where, what, and whose patterns hold."""
    return [
        {
            "prefix": part.prefix,
            "about": part.about,
            "family": part.family or None,
            "preset": None if part.preset is None else part.preset.name,
            "policy": plan.policies[part.prefix],
        }
        for part in plan.parts
    ]


def slow_layers(plan: Plan) -> dict[str, str]:
    """Reason by layer, for those that ComfyUI multiplies in 16 bits."""
    reasons = {}
    reason = cache(comfyui.full_precision_reason)
    for layer in plan.layers:
        asked = "full_precision_matrix_mult" if layer.full_precision else None
        why = asked or reason(layer.format, layer.source.shape)
        if why is not None:
            reasons[layer.name] = why
    return reasons


def template(plan: Plan, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """A layer-config that decides as the plan does: one line for all layers of a kind that are treated alike."""
    by_kind: dict[str, dict[str, dict[str, Any]]] = {}
    for name, spec in decisions(plan, entries).items():
        by_kind.setdefault(skeleton(name), {})[name] = spec
    table: dict[str, Any] = {}
    for kind, members in by_kind.items():
        first = next(iter(members.values()))
        if len(members) > 1 and all(spec == first for spec in members.values()):
            pattern = re.escape(kind).replace(r"\#", r"\d+")
            table[f"^{pattern}$"] = {**first, "_layers": len(members)}
        else:
            table |= {f"^{re.escape(name)}$": spec for name, spec in members.items()}
    return table


def read_plan(path: str, source: Reader) -> tuple[Conversion, Decisions | None]:
    """The conversion that a plan file describes, with the lines that were edited in it; without any, its decisions.

    Raises:
        InputError: not a plan file, one of another checkpoint or version, or one with a layer too few or twice.
    """
    where = f"--plan {path}"
    with paused_collection():
        table = _read_table(path, where)
        _check_origin(table, source, where)
        given: dict[str, Any] = table["layers"]
        try:
            conversion = Conversion.from_settings(table["settings"])
        except (InputError, TypeError) as error:
            raise InputError(f"{where}: settings: {printable(str(error))}") from None
        made = decide(source.entries, conversion, str(source.path))
        planned = decisions(made, source.entries)
        missing = planned.keys() - given.keys()
        if missing:
            raise InputError(
                f"{where}: layers: {listed(missing)} missing; for a layer to stay as it is write "
                f'"{printable(min(missing))}": {{"skip": true}}'
            )
        edited = {name: spec for name, spec in given.items() if _differs(spec, planned.get(name))}
    if not edited:
        return conversion, made
    layers = {**(conversion.selection.layers or {}), **{name: _as_asked(spec) for name, spec in edited.items()}}
    return dataclasses.replace(conversion, selection=dataclasses.replace(conversion.selection, layers=layers)), None


def _read_table(path: str, where: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        table = json.loads(text, object_pairs_hook=unique_keys)
    except OSError as error:
        raise InputError(f"{where}: can't be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: line {error.lineno}: not JSON: {error.msg}") from None
    except RepeatedKeyError as error:
        raise InputError(f"{where}: {error}; leave one of the two") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not a plan; lrq plan IN --json writes one") from None
    parts = ("layers", "settings", "source")
    if not isinstance(table, dict) or not all(isinstance(table.get(part), dict) for part in parts):
        raise InputError(f"{where}: not a plan; lrq plan IN --json writes one")
    return table


def _check_origin(table: dict[str, Any], source: Reader, where: str) -> None:
    kind, version, origin = table.get(KIND), table.get("version"), table["source"]
    # True is 1.
    if type(kind) is not int or kind != 1:
        raise InputError(f"{where}: not a plan of this version; lrq plan IN --json writes one")
    if version != __version__:
        raise InputError(
            f"{where}: is of lrq {printable(str(version))}, and this is {__version__}; lrq plan IN --json writes one"
        )
    if origin.get("header_sha256") != source.header_sha256:
        raise InputError(f"{where}: is of another checkpoint ({printable(str(origin.get('name')))})")


def _differs(given: Any, planned: dict[str, Any] | None) -> bool:
    return bool(given != planned and (planned is None or _bare(given) != _bare(planned)))


def _bare(spec: Any) -> Any:
    return {key: value for key, value in spec.items() if not key.startswith("_")} if isinstance(spec, dict) else spec


def _as_asked(spec: Any) -> Any:
    return {**_bare(spec), "_why": "edited in the plan"} if isinstance(spec, dict) else spec
