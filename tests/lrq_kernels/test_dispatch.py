"""Who computes, and why."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys

import pytest
import torch

import lrq_kernels
from lrq_kernels import OPERATIONS, dispatch

W = torch.ones(16, 16)


def test_every_operation_has_a_reference() -> None:
    table = lrq_kernels.backends()
    assert set(table) == set(OPERATIONS)
    assert all(row["reference"] == "yes" for row in table.values())


def test_explain_gives_one_answer_a_backend() -> None:
    with lrq_kernels.use_backend("reference"):
        reasons = lrq_kernels.explain("quantize_nvfp4", W, None, None)
    assert list(reasons) == list(dispatch.BACKENDS)
    assert reasons["reference"] == "chosen"
    assert reasons["cuda"] not in ("chosen", "accepts")


def test_forced_backend_refuses_with_the_reason() -> None:
    with (
        lrq_kernels.use_backend("cuda"),
        pytest.raises(RuntimeError, match="amax: backend 'cuda' was asked for, but: "),
    ):
        lrq_kernels.amax(W)


def test_forcing_ends_with_the_block() -> None:
    with pytest.raises(ZeroDivisionError), lrq_kernels.use_backend("cuda"):
        raise ZeroDivisionError
    assert lrq_kernels.amax(W) == 1


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match="choose one of cuda, triton, cpu, reference"):
        lrq_kernels.use_backend("tpu")
    with pytest.raises(ValueError, match="operation 'quantise' does not exist"):
        lrq_kernels.explain("quantise", W)
    with pytest.raises(AttributeError):
        lrq_kernels.quantise  # noqa: B018


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRQ_BACKEND", "tpu")
    with pytest.raises(RuntimeError, match="LRQ_BACKEND=tpu: no such backend"):
        lrq_kernels.amax(W)
    monkeypatch.setenv("LRQ_BACKEND", "reference")
    assert dispatch.choose("quantize_nvfp4", (W, None, None)) == "reference"


def test_a_failing_kernel_raises_and_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ArithmeticError("broken")

    monkeypatch.setitem(dispatch._kernels, ("amax", "reference"), dispatch.Kernel(fails, dispatch.accepts_all))
    message = "amax: the reference kernel failed: broken"
    with lrq_kernels.use_backend("reference"), pytest.raises(RuntimeError, match=message) as caught:
        lrq_kernels.amax(W)
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_out_of_memory_keeps_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(dispatch._kernels, ("amax", "reference"), dispatch.Kernel(fails, dispatch.accepts_all))
    with lrq_kernels.use_backend("reference"), pytest.raises(torch.OutOfMemoryError):
        lrq_kernels.amax(W)


@pytest.mark.parametrize("statement", ["import lrq_kernels", "import lrq", "import lrq.cli"])
def test_importing_leaves_torch_alone(statement: str) -> None:
    """The start takes under half a second because torch, triton and numpy come with the first use."""
    check = f"import sys; {statement}; sys.exit(bool({{'torch', 'triton', 'numpy', 'rich'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], env=dict(os.environ)).returncode == 0


def test_explain_explains_under_a_backend_that_refuses() -> None:
    with lrq_kernels.use_backend("cuda"):
        reasons = lrq_kernels.explain("amax", torch.ones(2, 2))
    assert "chosen" not in reasons.values() and reasons["reference"] == "accepts"
    assert reasons["cuda"] not in ("accepts", "chosen")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "missing a required argument: 'x'"),
        (("foo",), "x: must be a torch.Tensor, got str"),
        ((None,), "x: must be a torch.Tensor, got NoneType"),
        ((W.double(),), "x: dtype must be one of float32, bfloat16, float16, got float64"),
    ],
)
def test_explain_asks_the_contract(arguments: tuple, words: str) -> None:
    with pytest.raises(TypeError, match=f"^quantize_nvfp4: {words}$"):
        lrq_kernels.explain("quantize_nvfp4", *arguments)


def test_forcing_can_be_entered_again() -> None:
    forcing = lrq_kernels.use_backend("reference")
    for _ in range(2):
        with forcing, lrq_kernels.use_backend("cuda"), forcing:
            assert dispatch.forced_backend() == "reference"
        assert dispatch.forced_backend() is None


def test_threads_may_share_one_forced_block() -> None:
    """As they do where it decorates a function: who enters first may leave first."""
    forcing, threads = lrq_kernels.use_backend("reference"), [contextvars.copy_context() for _ in range(2)]
    for thread in threads:
        thread.run(forcing.__enter__)
        assert thread.run(dispatch.forced_backend) == "reference"
    for thread in threads:
        thread.run(forcing.__exit__, None, None, None)
        assert thread.run(dispatch.forced_backend) is None
