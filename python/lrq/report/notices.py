"""What a user should know of a conversion, one line each."""

from __future__ import annotations

from pathlib import Path

from lrq.checkpoint.sources import SHARD
from lrq.config import Conversion
from lrq.errors import counted, printable
from lrq.formats import STOCK
from lrq.models.policy import load_policy, policy_of
from lrq.models.preset import Preset
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
        *_lone_shard(plan.source),
        *map(_unrecognised, _by_generic_policy(plan)),
        *_overridden(plan),
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


def _lone_shard(source: Path) -> list[str]:
    found = SHARD.fullmatch(source.name)
    if found is None or int(found[3]) < 2:
        return []
    return [f"{printable(source.name)} is one of {int(found[3])} parts of a model; name their index or folder instead"]


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


def _overridden(plan: Plan) -> list[str]:
    """Of parts with another preset than that of their model: whose it is, and what the model's own would have kept."""
    found = []
    for part in plan.parts:
        presets = plan.presets[part.prefix]
        if part.preset is None or part.preset in presets:
            continue
        foreign = [preset for preset in presets if not part.is_for(preset)]
        said = [f"--preset {printable(preset.name)} is for {printable(preset.about)}" for preset in foreign]
        names = _unprotected(plan, part, part.preset)
        if names:
            said.append(
                f"--preset {part.preset.name} would keep {counted(len(names), 'layer')} ({printable(names[0])}, ...) "
                "that will be quantized"
            )
        if said:
            found.append(f"{part.about} is recognised, and {'; '.join(said)}")
    return found


def _unprotected(plan: Plan, part: Part, own: Preset) -> list[str]:
    """The layers that are quantized though the model's own preset would have kept them."""
    policy, start = policy_of((own,)), len(part.prefix)
    names = [layer.name for layer in plan.layers if layer.name.startswith(part.prefix) and not layer.asked]
    return [name for name in names if policy.verdict(name[start:]).action == "keep"]
