"""Installing without a compiler: everything still works, in plain PyTorch or Triton."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("csrc", "lrq_kernels", "python", "setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")


WITHOUT_EDITABLE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
from lrq.cli import main
main()
"""
"""An editable installation would lend its native extension."""


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lrq installed by LRQ_NATIVE=off, where no compiler, CMake or Ninja can be found."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("pure")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    empty = tmp_path_factory.mktemp("path")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CXX", "PYTHONPATH"))}
    environment |= {"LRQ_NATIVE": "off", "PATH": str(empty)}
    subprocess.run([*pip, "--target", target, "."], cwd=source, env=environment, check=True)
    assert not list(target.rglob("*.so"))
    return target


def lrq(pure: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LRQ_BACKEND"} | {"PYTHONPATH": str(pure)}
    command = [sys.executable, "-c", WITHOUT_EDITABLE, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_backends_say_why(pure: Path, tmp_path: Path) -> None:
    table = json.loads(lrq(pure, tmp_path, "backends", "--json").stdout)
    assert table["quantize_nvfp4"]["reference"] == "yes"
    assert "native extension is not built" in table["quantize_nvfp4"]["cpu"]
    assert "native extension is not built" in table["quantize_nvfp4"]["cuda"]


def test_same_bytes_without_native_kernels(pure: Path, tmp_path: Path, digits: Path) -> None:
    import lrq as installed

    flags = ("--nvfp4", "--simple")
    result = lrq(pure, tmp_path, "convert", "-i", digits, "-o", "pure.safetensors", *flags)
    assert result.returncode == 0, result.stderr
    installed.quantize(digits, tmp_path / "native.safetensors", nvfp4=True, simple=True)
    assert (tmp_path / "pure.safetensors").read_bytes() == (tmp_path / "native.safetensors").read_bytes()


@pytest.mark.parametrize("flags", [["--mxfp8"], ["--int8", "--scaling_mode", "row", "--convrot"], []])
def test_converting_and_verifying(pure: Path, tmp_path: Path, digits: Path, flags: list[str]) -> None:
    result = lrq(pure, tmp_path, "convert", "-i", digits, "-o", "out.safetensors", "--num_iter", 1, *flags)
    assert result.returncode == 0, result.stderr
    result = lrq(pure, tmp_path, "verify", "out.safetensors", "--source", digits)
    assert result.returncode == 0, result.stderr
