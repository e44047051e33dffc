"""Writes the tables of measurements into README.md and docs/FORMATS.md, from the kept results of the benchmarks.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = ("3072x3072", "14336x4096", "18432x5120", "64x1024x1024")
FORMATS = {
    "nvfp4": "NVFP4",
    "mxfp8": "MXFP8",
    "fp8": "FP8",
    "int8-row": "INT8 by row",
    "int8-row-convrot": "INT8 by row, `--convrot`",
}


def kernel_table() -> str:
    """Share of the copy bandwidth by case and shape, and the time of the best peer over ours."""
    results = _read("kernels-h200")
    rows = [row for row in results["results"] if "case" in row]
    machine, copy = results["machine"], results["results"][0]["copy_gb_s"]
    where = f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, commit {machine['commit']}"
    lines = [
        f"{where}: % of the {copy:.0f} GB/s of a 1 GiB copy in the same run",
        "(bf16, inputs read once, outputs written once), CUDA / Triton; in brackets how many times faster CUDA is than",
        f"{' or '.join(_peers(machine, rows))}.",
        "",
        f"| | {' | '.join(SHAPES)} |",
        "|---|" + "---|" * len(SHAPES),
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        lines.append(f"| {case} | {' | '.join(_gpu_cell(rows, case, shape) for shape in SHAPES)} |")
    return "\n".join(lines) + "\n"


def _peers(machine: dict, rows: list[dict]) -> list[str]:
    """The peers that were measured, with the versions that are known."""
    names = {"kitchen": f"comfy-kitchen {machine.get('comfy-kitchen', '')}".strip(), "torchao": "torchao"}
    return [name for who, name in names.items() if any(row["who"].startswith(who) for row in rows)]


def _best_peer(found: dict[str, dict]) -> float | None:
    return min((row["us"] for who, row in found.items() if who.startswith(("kitchen", "torchao"))), default=None)


def _gpu_cell(rows: list[dict], case: str, shape: str) -> str:
    found = {row["who"]: row for row in rows if (row["case"], row["shape"]) == (case, shape)}
    shares = [f"{found[who]['percent_of_copy']:.0f}" for who in ("torch", "cuda", "triton") if who in found]
    peer = _best_peer(found)
    ratio = f" ({peer / found['cuda']['us']:.1f}×)" if peer and "cuda" in found else ""
    return " / ".join(shares) + ratio


def cpu_table() -> str:
    """How many times faster the C++ kernels are than the reference and the peer, and their share of a copy."""
    results = _read("kernels-cpu")
    rows = [row for row in results["results"] if "case" in row]
    machine = results["machine"]
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}"
    lines = [
        f"{where}, 3072x3072: how many times faster C++ is than plain",
        f"PyTorch and than comfy-kitchen {machine.get('comfy-kitchen', '')}, and its % of the speed of a copy",
        "of the same bytes.",
        "",
        "| | PyTorch | comfy-kitchen | % of copy |",
        "|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["who"]: row for row in rows if row["case"] == case}
        if not {"cpu", "reference"} <= found.keys():
            continue
        us, peer = found["cpu"]["us"], _best_peer(found)
        ratio = f"{peer / us:.1f}×" if peer else ""
        percent = found["cpu"]["percent_of_copy"]
        share = f"{percent:.0f}" if percent >= 1 else f"{percent:.1f}"
        lines.append(f"| {case} | {found['reference']['us'] / us:.0f}× | {ratio} | {share} |")
    return "\n".join(lines) + "\n"


def quality_table() -> str:
    """Error of two models' output by format and method, in units of round-to-nearest."""
    rows = _read("quality")["results"]
    measures = {"MiniLM": "minilm", "diffusion, median": "digits_median", "diffusion, all": "digits"}
    methods = {"`--simple`": "best scales", "learned": "learned (default)"}
    heads = [f"{name}: {method}" for name in measures for method in methods]
    lines = [f"| format | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for key, name in FORMATS.items():
        found = {row["method"]: row for row in rows if row["format"] == key}
        # Formats without scales to search are rounded to nearest by --simple.
        made = {how: found.get(method, found["nearest"]) for how, method in methods.items()}
        cells = [
            f"{row[measure] / found['nearest'][measure]:.2f}" for measure in measures.values() for row in made.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def conversion_table() -> str:
    """Speed and peak memory of whole conversions on a CPU, beside ctq and the slowest stage."""
    results = _read("convert-cpu")
    rows, machine = results["results"], results["machine"]
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}"
    lines = [
        f"{where}: a bf16 file of {rows[0]['source_bytes'] / 1e9:.2f} GB",
        "with FLUX's shapes, `--simple --comfy_quant`, whole processes (`benchmarks/bench_convert.py`).",
        "",
        "| | times as fast as convert-to-quant | peak memory, predicted | of convert-to-quant's | "
        "of the slowest stage's speed |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        memory = f"{row['peak_bytes'] / 1e6:.0f} MB, {row['predicted_bytes'] / 1e6:.0f} MB"
        share = f"{100 * row['share_of_slowest']:.0f} % ({row['slowest']})"
        lines.append(
            f"| {FORMATS[row['format']]} | {row['times_ctq']:.1f} | {memory} | "
            f"{100 * row['memory_of_ctq']:.0f} % | {share} |"
        )
    return "\n".join(lines) + "\n"


def gpu_conversion_table() -> str:
    """Throughput of whole conversions on a GPU, and the share of the slowest stage's speed."""
    results = _read("convert-h200")
    rows, machine = results["results"], results["machine"]
    where = f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}"
    lines = [
        f"{where}: {rows[0]['source_bytes'] / 1e9:.0f} GB of bf16 with FLUX's shapes,",
        "from and to memory (tmpfs), `--simple --comfy_quant`, start of CUDA included.",
        "",
        "| | time | throughput | of the slowest stage's speed | peak memory, predicted |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        share = f"{100 * row['share_of_slowest']:.0f} % ({row['slowest']})"
        memory = f"{row['peak_bytes'] / 1e6:.0f} MB, {row['predicted_bytes'] / 1e6:.0f} MB"
        cells = [f"{row['run_s']:.1f} s", f"{row['gb_s']:.1f} GB/s", share, memory]
        lines.append(f"| {FORMATS[row['format']]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def budget_table() -> str:
    """Error of two models' output by bits a weight: the chosen mixture beside the other file of that size."""
    rows = _read("budget")["results"]
    measures = {"minilm": "distance", "digits": "median"}
    heads = [f"{name}: {who}" for name in ("MiniLM", "diffusion") for who in ("`--target_bits`", "the other")]
    lines = [f"| bits | the other file | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for target in dict.fromkeys(row["target"] for row in rows):
        found = {(row["model"], row["who"] == "target_bits"): row for row in rows if row["target"] == target}
        other = found["minilm", False]["who"]
        cells = [f"{found[model, ours][key]:#.3g}" for model, key in measures.items() for ours in (True, False)]
        lines.append(f"| {target:g} | {FORMATS.get(other, other)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def calibrated_table() -> str:
    """1 - cosine of MiniLM's embeddings by method and format, in units of round-to-nearest."""
    rows = _read("calibrated")["results"]
    found = {(row["method"], row["format"]): row["ratio"] for row in rows}
    lines = [f"| | {' | '.join(FORMATS.values())} |", "|---|" + "---|" * len(FORMATS)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [f"{found[method, key]:.3f}" if (method, key) in found else "" for key in FORMATS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    nearest = [row["distance"] for row in rows if row["method"] == "nearest"]
    lines.append(f"| 1 − cosine of nearest | {' | '.join(f'{distance:.5f}' for distance in nearest)} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "conversions": conversion_table,
    "GPU conversions": gpu_conversion_table,
    "quality": quality_table,
    "budget": budget_table,
    "GPU kernels": kernel_table,
    "CPU kernels": cpu_table,
}
"""Tables by the name in their marks."""
OF_FORMATS: dict[str, Callable[[], str]] = {"calibrated": calibrated_table}
"""The same of docs/FORMATS.md."""
DOCUMENTS = {"README.md": TABLES, "docs/FORMATS.md": OF_FORMATS}


def _read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def with_tables(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """``text`` with every table between its two marks."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: benchmarks/readme_tables.py -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + table() + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for name, tables in DOCUMENTS.items():
        path = ROOT / name
        path.write_text(with_tables(path.read_text(), tables))
