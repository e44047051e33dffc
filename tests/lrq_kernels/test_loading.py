"""Backends are loaded at their first use: once, by one thread; one that does not load is missing, with the reason."""

from __future__ import annotations

import subprocess
import sys

import pytest


def _printed(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The import of a backend is made as slow as it is on a busy machine.
FIRST_USE = """
import importlib, threading, time
import torch, lrq_kernels
from lrq_kernels import dispatch
lrq_kernels.amax
load = importlib.import_module

def slow(name, *rest):
    time.sleep(0.2 * (name == "lrq_kernels.reference"))
    return load(name, *rest)

importlib.import_module = slow
answers, start = [], threading.Barrier(4)

def first():
    start.wait()
    answers.append(dispatch.refusal("amax", "reference", (torch.ones(2, 2),)))

threads = [threading.Thread(target=first) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
print(answers)
"""


def test_threads_wait_for_the_first_use() -> None:
    assert _printed(FIRST_USE) == "[None, None, None, None]"


WITHOUT_KNOBS = """
import torch, triton, lrq_kernels
del triton.knobs
for _ in range(2):
    print({row["triton"] for row in lrq_kernels.backends().values()})
    print(lrq_kernels.explain("amax", torch.ones(2, 2))["triton"])
"""


def test_a_backend_that_does_not_load_is_missing() -> None:
    """Triton 3.3 has no ``knobs``."""
    triton = pytest.importorskip("triton")
    if not hasattr(triton, "knobs"):
        pytest.skip("this Triton has none either")
    first, *others = _printed(WITHOUT_KNOBS).splitlines()
    reason = "lrq_kernels.triton does not load: AttributeError: module 'triton' has no attribute 'knobs'"
    assert first == repr({reason})
    assert others == [reason, first, reason]
