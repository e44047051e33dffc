"""Builds csrc/ with CMake; everything else about the package is in pyproject.toml.

LRQ_NATIVE      auto (default): with CUDA if nvcc is found; cuda: fail without it; cpu: leave CUDA out; off: pure Python
LRQ_CUDA_ARCHS  CUDA architectures to build for, such as 90a or "90a;100f"
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CHOICES = ("auto", "cuda", "cpu", "off")
NATIVE = os.environ.get("LRQ_NATIVE") or "auto"
if NATIVE not in CHOICES:
    sys.exit(f"LRQ_NATIVE must be one of {', '.join(CHOICES)}, got {NATIVE!r}")


def has_compiler() -> bool:
    """Whether CMake has a C++ compiler to find."""
    return bool(os.environ.get("CXX")) or any(map(shutil.which, ("c++", "g++", "clang++", "cl")))


def find_nvcc() -> str | None:
    """Path of nvcc: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, the first that has one."""
    homes = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    named = [os.environ["CUDACXX"]] if os.environ.get("CUDACXX") else []
    return next(filter(None, map(shutil.which, map(str, [*named, *homes, "nvcc"]))), None)


class CMakeBuild(build_ext):
    """Builds the one extension through CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = None if NATIVE == "cpu" else find_nvcc()
        if NATIVE == "cuda" and nvcc is None:
            sys.exit("LRQ_NATIVE=cuda, but nvcc was not found: set CUDA_HOME or CUDACXX")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        try:
            self._cmake(build, Path(self.get_ext_fullpath(ext.name)).resolve().parent, nvcc)
        except FileNotFoundError as error:
            sys.exit(f"building csrc needs {error.filename}; LRQ_NATIVE=off installs without it, in pure Python")
        except subprocess.CalledProcessError:
            sys.exit("building csrc failed, for the reason above; LRQ_NATIVE=off installs without it, in pure Python")

    def _cmake(self, build: Path, output: Path, nvcc: str | None) -> None:
        import pybind11

        archs = os.environ.get("LRQ_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "LRQ_OUTPUT": output,
            "LRQ_CUDA": "ON" if nvcc else "OFF",
            "LRQ_CUDA_ARCHS": archs,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        defined = [f"-D{name}={value}" for name, value in options.items()]
        # The cache may name a CMake, Ninja or nvcc of an earlier isolated build, gone since.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defined], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


native = NATIVE != "off"
if native and not has_compiler():
    if NATIVE != "auto":
        sys.exit(f"LRQ_NATIVE={NATIVE}, but there is no C++ compiler; LRQ_NATIVE=off installs without one")
    print("lrq: no C++ compiler found, installing without native kernels", file=sys.stderr)
    native = False

setup(
    ext_modules=[Extension("lrq_kernels._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
