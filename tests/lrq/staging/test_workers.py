"""Layers computed side by side: the same bytes in the same order, and the first error is the one that is told."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints import normal, save
from lrq import quantize
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion, Rounding
from lrq.errors import InputError
from lrq.execution import Execution
from lrq.plan import make_plan
from lrq.staging import memory
from lrq.staging.workers import Workers

CPU = torch.device("cpu")
HERE = Workers.call_here
WAIT = 60
"""Seconds after which nobody comes any more."""


@pytest.fixture
def source(tmp_path) -> Path:
    tensors = {f"blocks.{i}.fc.weight": normal(64 + 16 * i, 128, seed=i).bfloat16() for i in range(6)}
    return save(tmp_path / "in.safetensors", tensors | {"blocks.0.experts.weight": normal(3, 64, 128, seed=9)})


def side_by_side(monkeypatch) -> None:
    """Two layers at a time on the CPU as well."""
    real = memory.plan_memory
    monkeypatch.setattr("lrq.run.plan_memory", lambda *a: replace(real(*a), workers=2))


@pytest.fixture
def two(monkeypatch) -> None:
    side_by_side(monkeypatch)


def learned(source: Path, name: str, **settings: object) -> tuple[bytes, list[str]]:
    heard: list[str] = []
    output = source.with_name(f"{name}.safetensors")
    quantize(source, output, on_layer=lambda layer: heard.append(layer.name), num_iter=20, **settings)
    return output.read_bytes(), heard


@pytest.mark.parametrize("settings", [{"nvfp4": True}, {"int8": True, "scaling_mode": "row"}, {}])
def test_the_bytes_and_the_order_are_those_of_one(source, monkeypatch, settings):
    alone = learned(source, "one", **settings)
    side_by_side(monkeypatch)
    assert learned(source, "two", **settings) == alone


def test_simple_tiles_with_a_scale_of_their_matrix_go_along(source, two, monkeypatch):
    whole = learned(source, "whole", simple=True)
    monkeypatch.setattr(memory, "CPU_TILE", 1 << 40)
    monkeypatch.setattr(memory, "_room", lambda *_: memory._Room("--max_ram", 44_000, 44_000))
    monkeypatch.setattr("lrq.staging.tiles.SMALL", 0)
    calls = []
    monkeypatch.setattr(Workers, "call_here", lambda self, call, *args: calls.append(1) or HERE(self, call, *args))
    assert learned(source, "tiled", simple=True)[0] == whole[0] and len(calls) >= 4


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(source, two):
    broken = {f"blocks.{i}.fc.weight": normal(64, 128, seed=i) for i in range(8)}
    for i in (3, 4, 5):
        broken[f"blocks.{i}.fc.weight"][i, i] = torch.nan
    save(source, broken)
    with pytest.raises(InputError, match=r"blocks\.3\.fc\.weight holds NaN or Inf"):
        learned(source, "out", nvfp4=True)
    assert not source.with_name("out.safetensors").exists()


def test_two_run_at_a_time_and_a_third_waits():
    together, gate = threading.Barrier(2), threading.Event()
    third: list[bool] = []

    def meet() -> int:
        together.wait(WAIT)
        assert gate.wait(WAIT)
        return threading.get_ident()

    with Workers(2, CPU) as workers:
        futures = [workers.submit(meet), workers.submit(meet)]

        def hand_in() -> None:
            third.append(workers.submit(lambda: all(one.done() for one in futures[:1])).result(WAIT))

        late = threading.Thread(target=hand_in)
        late.start()
        gate.set()
        late.join(WAIT)
        assert len({one.result(WAIT) for one in futures}) == 2
    assert third


def test_what_is_called_here_runs_alone_in_the_callers_thread():
    begun, running = threading.Event(), []

    def slow() -> None:
        running.append(1)
        begun.wait(0.05)
        running.pop()

    with Workers(2, CPU) as workers:
        workers.submit(slow)
        assert workers.call_here(lambda: (threading.get_ident(), list(running))).result() == (threading.get_ident(), [])


def test_one_calls_in_the_callers_thread_and_raises_at_once():
    with Workers(1, CPU) as workers:
        assert workers.submit(threading.get_ident).result() == threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            workers.submit(lambda: 1 / 0)


def test_layers_go_side_by_side_where_the_gpu_has_the_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 31))

    def count(alone=1 << 20, each=1 << 20, limit=None):
        return memory._workers(torch.device("cuda"), alone, each, limit)

    assert count() == memory.GPU_WORKERS == 3
    assert count(alone=1 << 30) == count(each=1 << 29) == count(limit=1 << 27) == 1
    assert count(limit=180 << 20) == 2


@pytest.mark.parametrize("settings,execution", [({}, {}), ({"simple": True}, {}), ({}, {"low_memory": True})])
def test_only_a_gpu_that_learns_has_two(source, monkeypatch, settings, execution):
    """The CPU computes with all of its threads, and simple rounding waits for the disk."""
    with Reader(source) as reader:
        layers = make_plan(reader, Conversion.from_settings({"preset": ["none"]})).layers
    monkeypatch.setattr(memory, "_workers", lambda *_: 2)
    monkeypatch.setattr(memory, "warm_up", lambda *_: None)
    monkeypatch.setattr(memory, "has_no_kernels", lambda *_: False)
    for kind in ("cpu", "cuda"):
        plan = memory.plan_memory(layers, Rounding(**settings), torch.device(kind), Execution(**execution))
        assert plan.workers == (2 if kind == "cuda" and not settings and not execution else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"nvfp4": True}, {"mxfp8": True, "projection": "both"}])
def test_side_by_side_on_a_gpu_gives_the_bytes_of_one(source, monkeypatch, settings):
    tensors = {f"blocks.{i}.fc.weight": normal(512, 768 + 256 * (i % 3), seed=i).bfloat16() for i in range(12)}
    save(source, tensors)
    two = learned(source, "two", device="cuda", **settings)
    again = learned(source, "again", device="cuda", **settings)
    monkeypatch.setattr(memory, "_workers", lambda *_: 1)
    assert learned(source, "one", device="cuda", **settings) == two == again
