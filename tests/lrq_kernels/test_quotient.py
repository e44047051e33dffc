"""Quotients by the reciprocal fall on the same side of every tie as true ones."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("quotient.cpp")
STEP = "29"
"""1 tries every divisor, which takes a minute and found no difference."""


def test_quotients_round_as_division(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "quotient"
    command = [compiler, "-std=c++17", "-O3", "-ffp-contract=off", "-o", program, SOURCE]
    subprocess.run(command, check=True)
    done = subprocess.run([program, STEP], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout.strip()} quotients differ"
