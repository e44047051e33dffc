"""What a user should know of a conversion, one line each."""

from __future__ import annotations

from lrq.config import Conversion
from lrq.errors import counted, printable
from lrq.formats import STOCK
from lrq.models.policy import load_policy, policy_of
from lrq.models.recognition import Part
from lrq.plan import Plan

FEW = 3
"""Tensors that are left out for one reason are named one by one up to this number."""


def notices(plan: Plan, conversion: Conversion) -> list[str]:
    """Formats that stock ComfyUI can't load, tensors left out, presets in doubt, rules and settings without effect."""
    needs = sorted({(layer.format.name, layer.format.loader) for layer in plan.layers if layer.format.loader != STOCK})
    return [
        *(f"{name} is read by {loader}; {STOCK} can't load this file" for name, loader in needs),
        *_left_out(plan),
        *map(_unrecognised, _by_generic_policy(plan)),
        *_unprotected(plan),
        *plan.inputs.notices,
        *plan.outdone,
        *conversion.without_effect(),
    ]


def _left_out(plan: Plan) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for entry in plan.dropped:
        reasons.setdefault(plan.why_dropped[entry.name], []).append(printable(entry.name))
    few = [f"{name} is left out: {why}" for why, names in reasons.items() if len(names) <= FEW for name in names]
    many = {why: names for why, names in reasons.items() if len(names) > FEW}
    return few + [f"{len(names)} tensors ({names[0]}, ...) are left out: {why}" for why, names in many.items()]


def _by_generic_policy(plan: Plan) -> list[Part]:
    """The parts whose layers the generic policy chose."""
    about = load_policy().about
    generic = [part for part in plan.parts if plan.policies[part.prefix] == about]
    if not generic:
        return []
    prefixes = sorted((part.prefix for part in plan.parts), key=len, reverse=True)
    quantized = {next(prefix for prefix in prefixes if layer.name.startswith(prefix)) for layer in plan.layers}
    return [part for part in generic if part.prefix in quantized]


def _unrecognised(part: Part) -> str:
    where = f" in {printable(part.prefix)}*" if part.prefix else ""
    return f"model not recognised{where}; the generic policy chose its layers: see --verbose, or name a --preset"


def _unprotected(plan: Plan) -> list[str]:
    """Of parts with another preset than that of their model: the layers that the model's own would have kept."""
    found = []
    for part in plan.parts:
        if part.preset is None or plan.policies[part.prefix] == part.preset.about:
            continue
        own, start = policy_of((part.preset,)), len(part.prefix)
        names = [layer.name for layer in plan.layers if layer.name.startswith(part.prefix) and not layer.asked]
        names = [name for name in names if own.verdict(name[start:]).action == "keep"]
        if names:
            layers = counted(len(names), "layer")
            found.append(
                f"{part.about} is recognised, and --preset {part.preset.name} would keep {layers} "
                f"({printable(names[0])}, ...) that will be quantized"
            )
    return found
