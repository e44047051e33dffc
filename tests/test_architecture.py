"""The floors of the house: imports only point down (CONTRIBUTING.md, "The house")."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLOORS = {
    "lrq_kernels": 0,
    "lrq.errors": 0,
    "lrq.config": 0,
    "lrq.settings": 0,
    "lrq.execution": 0,
    "lrq.packing": 1,
    "lrq.products": 1,
    "lrq.learning": 1,
    "lrq.formats": 1,
    "lrq.calibration": 1,
    "lrq.repair": 1,
    "lrq.rounding": 1,
    "lrq.plan": 2,
    "lrq.selection": 2,
    "lrq.estimate": 2,
    "lrq.measure": 2,
    "lrq.pipeline": 2,
    "lrq.staging": 2,
    "lrq.checkpoint": 2,
    "lrq.dialects": 2,
    "lrq.models": 2,
    "lrq.report": 2,
    "lrq.run": 3,
    "lrq.calibrate": 3,
    "lrq.actscale": 3,
    "lrq.cli": 3,
    "lrq": 3,
}
"""Rooms by module name; the longest name that fits counts."""

NEVER = {
    "lrq.formats": ("lrq.rounding",),
    "lrq.checkpoint": ("lrq.plan", "lrq.formats", "lrq.rounding"),
    "lrq.models": ("lrq.plan", "lrq.selection", "lrq.formats"),
    "lrq.selection": ("lrq.plan", "lrq.rounding"),
    "lrq.run": ("lrq.cli",),
}
"""Neighbours on one floor that don't know each other: room -> what it may not import."""


def room(module: str) -> str:
    fitting = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return max(fitting, key=len)


def sources() -> Iterator[tuple[str, Path]]:
    for base in (ROOT, ROOT / "python"):
        for package in ("lrq_kernels", "lrq"):
            for path in sorted((base / package).rglob("*.py")):
                name = ".".join(path.relative_to(base).with_suffix("").parts)
                yield name.removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def arrows() -> Iterator[tuple[str, str]]:
    for name, path in sources():
        for target in imports(path):
            if target.split(".")[0] in ("lrq", "lrq_kernels"):
                yield name, target


def test_every_module_has_a_room() -> None:
    found = list(sources())
    assert len(found) > 40
    for name, _ in found:
        assert name == "lrq" or room(name) != "lrq", f"{name}: which floor is it on?"


def test_imports_point_down() -> None:
    for source, target in arrows():
        if source != "lrq":
            assert FLOORS[room(target)] <= FLOORS[room(source)], f"{source} imports {target}, a floor above it"


def test_neighbours_keep_apart() -> None:
    for source, target in arrows():
        for forbidden in NEVER.get(room(source), ()):
            assert room(target) != forbidden, f"{source} imports {target}"


def test_kernels_know_no_format_and_no_file() -> None:
    for source, target in arrows():
        if room(source) == "lrq_kernels":
            assert room(target) == "lrq_kernels", f"{source} imports {target}"
    for name, path in sources():
        if room(name) == "lrq_kernels":
            assert "safetensors" not in set(imports(path)), name


def test_only_the_top_floor_prints() -> None:
    for name, path in sources():
        if FLOORS[room(name)] < 3:
            called = {
                node.func.id
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert "print" not in called, name
            assert not {"click", "rich"} & {target.split(".")[0] for target in imports(path)}, name


def test_csrc_knows_no_torch() -> None:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert files
    for path in files:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)", path.read_text()), path


def test_files_and_functions_stay_small() -> None:
    for name, path in sources():
        text = path.read_text()
        assert text.count("\n") <= 300, f"{name} has over 300 lines: a noun is missing"
        if "triton" in name:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = (
                    node.end_lineno
                    - node.body[0].lineno
                    - bool(ast.get_docstring(node)) * len((ast.get_docstring(node) or "").splitlines())
                )
                assert body <= 60, f"{name}.{node.name} has {body} lines"


def test_backends_share_their_file_names() -> None:
    from lrq_kernels import OPERATIONS

    for folder in ("ops", "reference"):
        present = {path.stem for path in (ROOT / "lrq_kernels" / folder).glob("*.py")}
        assert set(OPERATIONS.values()) <= present, folder
    for folder in ("lrq_kernels/triton", "csrc/cpu", "csrc/cuda"):
        files = [path for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".cpp", ".cu")]
        # What kernels share lies in headers, or in modules that register none.
        kernels = {path.stem for path in files if path.suffix != ".py" or "@kernel(" in path.read_text()}
        unknown = kernels - set(OPERATIONS.values()) - {"rows"}
        assert not unknown, f"{folder}: {unknown} are named after no operation's file"


def test_no_two_test_files_have_one_name() -> None:
    # pytest imports them by it: where byte code is kept, the second is not collected.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


def test_nothing_tracked_names_a_machine() -> None:
    machine = re.compile(r"(^|[^A-Za-z0-9_.])/(work|root|farm|home)/|pypi\.org|pythonhosted")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for path in filter(None, listed.split("\0")):
        if not path.endswith((".safetensors", "test_architecture.py")) and (ROOT / path).is_file():
            found = machine.search((ROOT / path).read_text(errors="ignore"))
            assert found is None, f"{path}: {found and found[0]}"
