"""What --target_bits buys on two real models, beside one format for all layers and beside layers widened in file order.

    python benchmarks/bench_budget.py [--json benchmarks/results/budget.json]
    python benchmarks/bench_budget.py --effects

Files are those of the default, learned rounding. Distances are those of bench_quality.py. With ``--effects``: what a
target leaves of the effects of single layers, each measured by itself, beside the least that could be left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lrq
import real_models
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.formats import FORMATS
from lrq.plan import make_plan
from lrq.selection.budget import SOURCE, Point, allocate, stored_bits, weight_of_error
from lrq.selection.evenness import evenness
from lrq.selection.heuristics import nearest, relative_error
from measure import machine

TARGETS = (5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 8.25)
UNIFORM = {8.0: "fp8", 8.25: "mxfp8"}
NARROW, WIDE = FORMATS["nvfp4"], FORMATS["fp8"]


def in_file_order(source: Path, target: float) -> dict[str, Any]:
    """NVFP4, and FP8 for as many layers from the file's first on as fit: the mixture of who knows nothing."""
    with Reader(source) as reader:
        layers = make_plan(reader, Conversion.from_settings({"nvfp4": True})).layers
    shapes = {layer.name: layer.source.shape for layer in layers}
    left = target * sum(map(math.prod, shapes.values())) - sum(stored_bits(NARROW, shape) for shape in shapes.values())
    widened = {}
    for name, shape in shapes.items():
        left -= stored_bits(WIDE, shape) - stored_bits(NARROW, shape)
        if left < 0:
            break
        widened[name] = {"format": WIDE.name}
    return {"nvfp4": True, "layers": widened or None}


def settings_of(source: Path, target: float) -> dict[str, dict[str, Any]]:
    """Settings of the files to compare at one size."""
    uniform = UNIFORM.get(target)
    flags = {} if uniform == "fp8" else {uniform: True}
    other = in_file_order(source, target) if uniform is None else flags
    return {"target_bits": {"target_bits": target}, "file order" if uniform is None else uniform: other}


def bench(samples: int, seed: int) -> list[dict[str, object]]:
    encoder = real_models.MiniLM(real_models.english_sentences(512))
    sentences, digits = real_models.load_minilm(), real_models.load_digits()
    transformer = real_models.DigitsDiT(samples)
    embeddings, images = encoder.embed(sentences), transformer.sample(digits)
    files = {"minilm": real_models.minilm_folder() / "model.safetensors", "digits": real_models.DIGITS}
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for target, (model, source) in itertools.product(TARGETS, files.items()):
            original = sentences if model == "minilm" else digits
            for who, settings in settings_of(source, target).items():
                summary = lrq.quantize(source, Path(folder) / "out.safetensors", seed=seed, **settings)
                state = real_models.load_converted(summary.output, original)
                row: dict[str, object] = {"target": target, "model": model, "who": who, "bytes": summary.output_size}
                if model == "minilm":
                    row["distance"] = encoder.distance(embeddings, state)
                else:
                    each = transformer.distances(images, state)
                    row |= {"distance": each.square().mean().sqrt().item(), "median": each.median().item()}
                rows.append(row)
                print(
                    "  ".join(f"{value:.5f}" if isinstance(value, float) else f"{value}" for value in row.values()),
                    flush=True,
                )
    return rows


def effects(samples: int) -> None:
    """By model and target: the sum of the effects that stay, over the least possible, with evenness and without."""
    encoder, sentences = real_models.MiniLM(real_models.english_sentences(256)), real_models.load_minilm()
    transformer, digits = real_models.DigitsDiT(samples), real_models.load_digits()
    embeddings, images = encoder.embed(sentences), transformer.sample(digits)
    models: dict[str, tuple[Path, real_models.State, Callable[[real_models.State], float]]] = {
        "minilm": (
            real_models.minilm_folder() / "model.safetensors",
            sentences,
            lambda state: encoder.distance(embeddings, state),
        ),
        "digits": (
            real_models.DIGITS,
            digits,
            lambda state: transformer.distances(images, state).square().mean().item(),
        ),
    }
    for model, (source, original, distance) in models.items():
        points: dict[str, dict[str, list[Point]]] = {"measured": {}, "evenness": {}, "plain": {}}
        with Reader(source) as reader:
            for layer in make_plan(reader, Conversion()).layers:
                w = reader.read(layer.source.name).float()
                (key,) = (name for name in original if name.endswith(layer.source.name))
                even, rows = evenness(w), weight_of_error(layer.source.shape)
                for fmt in (NARROW, WIDE):
                    bits, error = stored_bits(fmt, layer.source.shape), rows * relative_error(fmt, w) ** 2
                    effect = distance({**original, key: nearest(fmt, w).to(original[key].dtype)})
                    for way, value in (("measured", effect), ("evenness", even * error), ("plain", error)):
                        points[way].setdefault(layer.name, []).append(Point(fmt.name, bits, value))
                for way in points:
                    points[way][layer.name].append(Point(SOURCE, 16 * w.numel(), 0.0))
        known = {(name, p.name): p.error for name, some in points["measured"].items() for p in some}
        weights = sum(some[-1].bits // 16 for some in points["plain"].values())
        for target in (*TARGETS, 8.5, 9.0, 10.0, 12.0):
            left = {}
            for way, layers in points.items():
                chosen = allocate(layers, math.floor(target * weights)).chosen
                left[way] = sum(known[name, point.name] for name, point in chosen.items())
            ratios = "  ".join(f"{way} {left[way] / left['measured']:.3f}" for way in ("evenness", "plain"))
            print(f"{model}  {target:g}  {ratios}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of learned rounding")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--effects", action="store_true", help="the effects of single layers instead")
    options = parser.parse_args()
    if options.effects:
        effects(options.samples)
        raise SystemExit
    results = bench(options.samples, options.seed)
    if options.json:
        document = {"machine": machine(torch.device("cpu")), "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
