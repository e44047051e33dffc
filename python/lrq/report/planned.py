"""A plan as a document: to read, to edit and to give back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from lrq.checkpoint.header import BITS
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.dialects import comfyui
from lrq.errors import InputError, printable
from lrq.estimate import Estimate
from lrq.measure import Budget
from lrq.models.patterns import skeleton
from lrq.models.policy import SUFFIX
from lrq.plan import Plan, make_plan
from lrq.report.notices import notices
from lrq.selection.layer import Layer
from lrq.selection.storage import spec_of
from lrq_kernels._version import __version__

KIND = "lrq_plan"
"""Key, and with it the version of the layout, of a plan file."""
DEFAULT_WHY = "the run's format"


def decisions(plan: Plan) -> dict[str, dict[str, Any]]:
    """Rule by layer, as in a layer-config: what is quantized, and the matrices that stay as they are."""
    table = {layer.name: {**_spec(layer), "_why": layer.why or DEFAULT_WHY} for layer in plan.layers}
    for entry in plan.copied:
        why = plan.refused.get(entry.name) or plan.kept.get(entry.name, "")
        if entry.name.endswith(SUFFIX) and len(entry.shape) in (2, 3) and not _never(why, entry.dtype):
            table[entry.name.removesuffix(SUFFIX)] = {"skip": True, "_why": why}
    return table


def _never(why: str, dtype: str) -> bool:
    return why in (dtype, "quantized already", "3-D", "empty")


def _spec(layer: Layer) -> dict[str, Any]:
    return spec_of(layer.format, layer.full_precision, layer.simple)


def bits_per_weight(plan: Plan) -> tuple[float, float]:
    """Bits of an element: of the quantized layers with their scales, and of the whole model."""
    weights = sum(math.prod(layer.source.shape) for layer in plan.layers)
    biases = [f"{layer.name}.{comfyui.BIAS}" for layer in plan.layers if layer.corrects is not None]
    known = {entry.name: entry for entry in plan.header.entries} if biases else {}
    as_they_are = [*plan.copied, *(known[name] for name in biases)]
    stored = plan.header.data_size - sum(entry.size for entry in as_they_are)
    elements = weights + sum(entry.size * 8 // BITS[entry.dtype] for entry in as_they_are)
    return 8 * stored / max(weights, 1), 8 * plan.header.data_size / max(elements, 1)


def document(
    source: Reader, plan: Plan, conversion: Conversion, needs: Estimate, budget: Budget | None = None
) -> dict[str, Any]:
    """Everything that the plan says, for JSON."""
    quantized_bits, bits = bits_per_weight(plan)
    formats = Counter(layer.format.name for layer in plan.layers)
    slow = slow_layers(plan)
    return {
        KIND: 1,
        "version": __version__,
        "source": {"name": source.path.name, "size": source.size, "header_sha256": source.header_sha256},
        "models": models(plan),
        "output_bytes": plan.output_size,
        "bits_per_weight": round(bits, 4),
        "bits_per_quantized_weight": round(quantized_bits, 4),
        "formats": dict(formats),
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
        "layers": decisions(plan),
    }


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


def template(plan: Plan) -> dict[str, Any]:
    """A layer-config that decides as the plan does: one line for all layers of a kind that are treated alike."""
    by_kind: dict[str, dict[str, dict[str, Any]]] = {}
    for name, spec in decisions(plan).items():
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


def read_plan(path: str, source: Reader) -> Conversion:
    """The conversion that a plan file describes, with the lines that were edited in it.

    Raises:
        InputError: not a plan file, or one of another checkpoint or version.
    """
    where = f"--plan {path}"
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        given, settings, sha = table["layers"], table["settings"], table["source"]["header_sha256"]
    except OSError as error:
        raise InputError(f"{where}: can't be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{where}: not a plan; lrq plan IN --json writes one") from None
    if table.get(KIND) != 1 or not isinstance(given, dict) or not isinstance(settings, dict):
        raise InputError(f"{where}: not a plan of this version; lrq plan IN --json writes one")
    if sha != source.header_sha256:
        raise InputError(f"{where}: is of another checkpoint ({printable(str(table['source'].get('name')))})")
    try:
        conversion = Conversion.from_settings(settings)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: settings: {printable(str(error))}") from None
    planned = decisions(make_plan(source, conversion, allow_empty=True))
    edited = {name: spec for name, spec in given.items() if _bare(spec) != _bare(planned.get(name))}
    if not edited:
        return conversion
    layers = {**(conversion.selection.layers or {}), **{name: _as_asked(spec) for name, spec in edited.items()}}
    return dataclasses.replace(conversion, selection=dataclasses.replace(conversion.selection, layers=layers))


def _bare(spec: Any) -> Any:
    return {key: value for key, value in spec.items() if not key.startswith("_")} if isinstance(spec, dict) else spec


def _as_asked(spec: Any) -> Any:
    return {**_bare(spec), "_why": "edited in the plan"} if isinstance(spec, dict) else spec
