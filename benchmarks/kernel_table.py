"""Writes the table of kernel speeds into README.md, from the results of bench_kernels.py.

python benchmarks/kernel_table.py [benchmarks/results/kernels-h100.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels-h100.json"
SHAPES = ("3072x3072", "14336x4096", "18432x5120", "64x1024x1024")
BEGIN, END = "<!-- kernel table: benchmarks/kernel_table.py -->\n", "<!-- end of kernel table -->\n"


def table(results: dict) -> str:
    """Share of the copy bandwidth by case and shape, and the time of the best peer over ours."""
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
        lines.append(f"| {case} | {' | '.join(_cell(rows, case, shape) for shape in SHAPES)} |")
    return "\n".join(lines) + "\n"


def _peers(machine: dict, rows: list[dict]) -> list[str]:
    """The peers that were measured, with the versions that are known."""
    names = {"kitchen": f"comfy-kitchen {machine.get('comfy-kitchen', '')}".strip(), "torchao": "torchao"}
    return [name for who, name in names.items() if any(row["who"].startswith(who) for row in rows)]


def _cell(rows: list[dict], case: str, shape: str) -> str:
    found = {row["who"]: row for row in rows if (row["case"], row["shape"]) == (case, shape)}
    peers = [row["us"] for who, row in found.items() if who.startswith(("kitchen", "torchao"))]
    shares = [f"{found[who]['percent_of_copy']:.0f}" for who in ("cuda", "triton") if who in found]
    ratio = f" ({min(peers) / found['cuda']['us']:.1f}×)" if peers and "cuda" in found else ""
    return " / ".join(shares) + ratio


def placed(readme: str, results: dict) -> str:
    """``readme`` with the table between its two marks."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END)[1]


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    readme = ROOT / "README.md"
    readme.write_text(placed(readme.read_text(), json.loads(path.read_text())))
