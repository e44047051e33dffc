"""What converted files do to two real models, per format: round-to-nearest with amax scales, best scales, learned.

    python benchmarks/bench_quality.py [--json benchmarks/results/quality.json]
    python benchmarks/bench_quality.py --ctq convert_to_quant [--json benchmarks/results/quality-ctq.json]

MiniLM: 1 - cosine of the embeddings of 512 English sentences. digits_dit: relative difference of samples from the same
noise, of all samples together and of the median sample (at 8 bits, one sample in hundreds that becomes another digit
outweighs all others). With --ctq: MiniLM alone, by lrq's defaults and by the command of convert-to-quant with 500
iterations, whole processes on the CPU; the error is that of the layers that both quantize.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import lrq
import real_models
from measure import machine

FORMATS = {
    "nvfp4": {"nvfp4": True},
    "mxfp8": {"mxfp8": True},
    "fp8": {},
    "int8-row": {"int8": True, "scaling_mode": "row"},
    "int8-row-convrot": {"int8": True, "scaling_mode": "row", "convrot": True},
}
CTQ_FLAGS = {"nvfp4": ["--nvfp4"], "fp8": []}
METHODS = {
    "nearest": {"simple": True, "scale_search": False},
    "best scales": {"simple": True},
    "learned (default)": {},
}


def bench(samples: int) -> list[dict[str, object]]:
    encoder = real_models.MiniLM(real_models.english_sentences(512))
    sentences = real_models.load_minilm()
    embeddings = encoder.embed(sentences)
    transformer = real_models.DigitsDiT(samples)
    digits = real_models.load_digits()
    images = transformer.sample(digits)
    rows: list[dict[str, object]] = []
    for fmt, flags in FORMATS.items():
        base: dict[str, float] = {}
        for method, how in METHODS.items():
            if method == "best scales" and fmt not in ("nvfp4", "mxfp8"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "out.safetensors"
                lrq.quantize(real_models.minilm_folder() / "model.safetensors", output, **flags, **how)
                found = {"minilm": encoder.distance(embeddings, real_models.load_converted(output, sentences))}
                lrq.quantize(real_models.DIGITS, output, **flags, **how)
                each = transformer.distances(images, real_models.load_converted(output, digits))
            found |= {"digits": each.square().mean().sqrt().item(), "digits_median": each.median().item()}
            base = base or found
            rows.append({"format": fmt, "method": method, **found})
            ratios = "  ".join(f"{key} {value:.5f} ({value / base[key]:.3f})" for key, value in found.items())
            print(f"{fmt:18} {method:18} {ratios}", flush=True)
    return rows


def beside_ctq(command: str) -> list[dict[str, object]]:
    source = real_models.minilm_folder() / "model.safetensors"
    encoder = real_models.MiniLM(real_models.english_sentences(512))
    sentences = real_models.load_minilm()
    embeddings = encoder.embed(sentences)
    lrq_command = [sys.executable, "-m", "lrq.cli", "convert", "--device", "cpu"]
    rows: list[dict[str, object]] = []
    for fmt in CTQ_FLAGS:
        both: dict[str, float] = {}
        states = {}
        with tempfile.TemporaryDirectory() as folder:
            for who, start in (("lrq", lrq_command), ("ctq", [command, "--num_iter", "500", "--device", "cpu"])):
                output = Path(folder) / f"{who}.safetensors"
                started = time.perf_counter()
                arguments = ["-i", str(source), "-o", str(output), "--comfy_quant", *CTQ_FLAGS[fmt]]
                subprocess.run([*start, *arguments], check=True, capture_output=True)
                both[f"{who}_s"] = time.perf_counter() - started
                states[who] = real_models.load_converted(output, sentences)
        changed = [
            name
            for name, w in sentences.items()
            if w.dim() == 2 and not any(torch.equal(state[name].float(), w.float()) for state in states.values())
        ]
        for who, state in states.items():
            both[who] = encoder.distance(embeddings, sentences | {name: state[name] for name in changed})
        row = {"format": fmt, "layers": len(changed), **both, "times_ctq": both["ctq_s"] / both["lrq_s"]}
        rows.append(row)
        print(
            f"{fmt:10} {len(changed)} layers: 1 - cosine {both['lrq']:.5f}, ctq {both['ctq']:.5f}; "
            f"{row['times_ctq']:.1f} times as fast",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ctq", metavar="COMMAND", help="the command convert_to_quant of convert-to-quant")
    options = parser.parse_args()
    results = bench(options.samples) if options.ctq is None else beside_ctq(options.ctq)
    if options.json:
        document = {"machine": machine(torch.device("cpu")), "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
