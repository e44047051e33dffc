"""Every CUDA file compiles for the targets it is built for, keeps to registers, and uses the instructions it should."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
FILES = sorted(path.stem for path in CUDA.glob("*.cu"))
TARGETS = ("90a", "100f", "120f")
# As CMakeLists.txt has them.
FLAGS = ("-std=c++17", "-O3", "-fmad=false")

HAS_CONVERSION = {"90a": False, "100f": True, "120f": True}
"""Whether a target turns float32 into E2M1 by an instruction."""


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(file, target) to the PTX and the resources of its kernels; one nvcc a file builds all targets at once."""
    found = {}

    def build(name: str, target: str) -> tuple[str, str]:
        if (name, target) not in found:
            folder = tmp_path_factory.mktemp(name)
            targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS]
            command = [nvcc(), *FLAGS, "-c", "--threads=0", "-keep", f"-keep-dir={folder}", "-Xptxas=-v", *targets]
            done = subprocess.run(
                [*command, "-o", folder / "out.o", CUDA / f"{name}.cu"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            output = done.stdout + done.stderr
            for t in TARGETS:
                (ptx,) = (p.read_text() for p in folder.glob("*.ptx") if f".target sm_{t}" in p.read_text())
                found[name, t] = ptx, "\n".join(re.findall(rf"for 'sm_{t}'\n(?:.*\n){{2}}.*", output))
        return found[name, target]

    return build


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FILES)
def test_keeps_to_registers(built, name, target):
    ptx, resources = built(name, target)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", resources)
    assert len(used) == ptx.count(".entry "), resources
    assert set(used) == {("0", "0", "0")}, resources


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FILES)
def test_touches_no_memory_before_its_turn(built, name, target):
    """A kernel may begin before the one before it has ended; it waits for that before it reads or writes."""
    ptx, _ = built(name, target)
    for kernel in ptx.split(".entry ")[1:]:
        before, waits, _ = kernel.partition("griddepcontrol.wait")
        assert waits and not re.search(r"(ld|st|atom|red)\.global", before), kernel.split("(")[0]


@pytest.mark.parametrize("target", TARGETS)
def test_nvfp4_converts_by_instruction(built, target):
    ptx, _ = built("nvfp4", target)
    assert ("cvt.rn.satfinite.e2m1x2" in ptx) == HAS_CONVERSION[target]


@pytest.mark.parametrize("target", TARGETS)
def test_mxfp8_converts_by_instruction(built, target):
    ptx, _ = built("mxfp8", target)
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx and "cvt.rn.f16x2.e4m3x2" in ptx
    # The exponent comes from the bits of the amax: no quotient, so nothing for ue8m0x2 to round.
    assert "ue8m0x2" not in ptx
    kernels = [kernel for kernel in ptx.split(".entry ")[1:] if "search_kernel" not in kernel.split("(")[0]]
    assert kernels and not any("div.rn.f32" in kernel for kernel in kernels)


def test_what_the_host_decides_of_large_matrices(tmp_path):
    program = tmp_path / "limits"
    source = Path(__file__).with_name("limits.cu")
    command = [nvcc(), *FLAGS, "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-O0", "-o", program, source]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
