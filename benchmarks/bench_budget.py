"""What --target_bits buys on two real models, beside one format for all layers and beside layers widened in file order.

    python benchmarks/bench_budget.py [--json benchmarks/results/budget.json]

Files are those of the default, learned rounding. Distances are those of bench_quality.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

import lrq
import real_models
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.formats import FORMATS
from lrq.plan import make_plan
from lrq.selection.budget import stored_bits
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


def bench(samples: int) -> list[dict[str, object]]:
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
                summary = lrq.quantize(source, Path(folder) / "out.safetensors", **settings)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = bench(options.samples)
    if options.json:
        document = {"machine": machine(torch.device("cpu")), "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
