"""Layers that get the same inputs share their sums, and only those; a GPU's sums are the CPU's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from checkpoints import normal
from lrq.calibration import collect
from lrq.calibration.accumulator import Accumulator
from lrq.calibration.bank import Bank
from lrq.calibration.collect import uncompiled
from lrq.calibration.experts import Routed
from measured import inputs


class Both(nn.Module):
    """Two layers; what happens to the inputs between them is given."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.between = nn.Linear(16, 4), nn.Linear(16, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(self.between(x))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every time that sums are made."""
    made: list[int] = []
    original = Accumulator._sums_of

    def spy(self: Accumulator, x: Tensor) -> dict[str, Tensor]:
        made.append(len(x))
        return original(self, x)

    monkeypatch.setattr(Accumulator, "_sums_of", spy)
    return made


def test_the_same_tensor_is_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    batches = [inputs(10, 16, seed=i) for i in range(3)]
    model = Both(lambda x: x)
    with torch.no_grad(), collect(model) as collector:
        for x in batches:
            model(x)
    stats, exact = collector.stats(), torch.cat(batches).double()
    assert made == [10, 10, 10]
    for name in ("q", "k"):
        assert stats[name].count == 30
        torch.testing.assert_close(stats[name].mean, exact.mean(0), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(stats[name].second, exact.square().mean(0), rtol=1e-13, atol=0)
    assert torch.equal(stats["q"].gram, stats["k"].gram) and torch.equal(stats["q"].histogram, stats["k"].histogram)


@pytest.mark.parametrize("between", [lambda x: x.mul_(2), lambda x: 2 * x])
def test_what_was_changed_is_summed_again(between: Callable[[Tensor], Tensor]) -> None:
    x = inputs(10, 16)
    model = Both(between)
    with torch.no_grad(), collect(model) as collector:
        model(x.clone())
    stats = collector.stats()
    torch.testing.assert_close(stats["q"].mean, x.double().mean(0), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(stats["k"].mean, 2 * x.double().mean(0), rtol=1e-14, atol=1e-14)


def test_a_changed_tensor_of_inference_mode_is_summed_again() -> None:
    """It has no version, so nothing is kept of it."""
    x = inputs(10, 16)
    with torch.inference_mode(), collect(model := Both(lambda x: x.mul_(2))) as collector:
        model(x.clone())
    torch.testing.assert_close(collector.stats()["k"].mean, 2 * x.double().mean(0), rtol=1e-14, atol=1e-14)


def test_another_mask_is_another_sum() -> None:
    x, mask = inputs(10, 16), torch.arange(10) < 6
    model = nn.ModuleDict({"q": nn.Linear(16, 4), "k": nn.Linear(16, 4), "v": nn.Linear(16, 4)})
    with torch.no_grad(), collect(model) as collector:
        model["q"](x)
        collector.mask = mask
        model["k"](x)
        mask[:3] = False
        model["v"](x)
    counts = {name: one.count for name, one in collector.stats().items()}
    assert counts == {"q": 10, "k": 6, "v": 3}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"gram_limit": 1, "rank": 64}], ids=["whole", "sketch"])
def test_a_gpu_sums_what_the_cpu_does(dtype: torch.dtype, options: dict[str, int]) -> None:
    """Eigenpairs leave a twentieth of the spectrum here, which sketches of one test matrix see alike."""
    x = torch.cat((normal(900, 24) @ normal(24, 192, seed=1) + 0.1 * normal(900, 192, seed=2) + 0.5, normal(7, 192)))
    x = x.to(dtype)
    x[3, 5] = 1e4
    found = []
    for device in ("cpu", "cuda"):
        accumulator = Accumulator(192, **options)
        for part in x.to(device).split(500):
            accumulator.update(part)
        found.append(accumulator.result())
    cpu, gpu = found
    assert cpu is not None and gpu is not None
    assert gpu.count == cpu.count and gpu.amax == cpu.amax and torch.equal(gpu.histogram, cpu.histogram)
    scale = cpu.second.sqrt()
    assert ((gpu.mean - cpu.mean).abs() <= 1e-6 * scale).all()
    torch.testing.assert_close(gpu.second, cpu.second, rtol=1e-6, atol=0)
    if options:
        rebuilt = [(one.vectors * one.values) @ one.vectors.T for one in (cpu, gpu)]
        assert (rebuilt[0] - rebuilt[1]).norm() <= 1e-4 * rebuilt[0].norm()
    else:
        outer = scale[:, None] * scale
        assert ((gpu.gram - cpu.gram).abs() <= 1e-5 * outer).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"gram_limit": 1, "rank": 40}, {"gram_limit": 1, "rank": 0}])
def test_experts_that_are_summed_together_are_so_apart(dtype: torch.dtype, options: dict[str, int]) -> None:
    """In groups of a few rows as well, and where an expert has sums of its own before."""
    counts, columns = [5, 0, 700, 1, 0, 33], 96
    x = (inputs(sum(counts), columns) * 3).to(dtype).cuda()
    apart = [Accumulator(columns, **options) for _ in counts]
    together = [Accumulator(columns, **options) for _ in counts]
    for one in (apart[2], together[2]):
        one.update(x[:9])
    bank = Bank(together)
    for chunk in (1 << 24, 40 * columns):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lrq.calibration.bank.CHUNK", chunk)
            bank.update(x, counts)
        for one, part in zip(apart, x.split(counts), strict=True):
            one.update(part)
    for a, b in zip((one.result() for one in apart), (one.result() for one in together), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.count == b.count and a.amax == b.amax and torch.equal(a.histogram, b.histogram)
            torch.testing.assert_close(a.mean, b.mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a.second, b.second, rtol=1e-6, atol=0)
            assert (a.gram is None) == (b.gram is None) and (a.gram is None or torch.equal(a.gram, b.gram))
            assert (a.values is None) == (b.values is None) and (a.values is None or torch.equal(a.values, b.values))


def test_a_standing_buffer_is_another_batch_every_time() -> None:
    """Filled without a word to its version, as numpy and collectives do."""
    room = np.zeros((10, 16), dtype=np.float32)
    x, model = torch.from_numpy(room), nn.Sequential(nn.Linear(16, 4))
    batches = [inputs(10, 16, seed=i) for i in range(3)]
    with torch.no_grad(), collect(model) as collector:
        for batch in batches:
            room[:] = batch.numpy()
            model(x)
    torch.testing.assert_close(collector.stats()["0"].mean, torch.cat(batches).double().mean(0), rtol=1e-14, atol=1e-14)


def test_learned_inputs_stay_free_to_be_swapped() -> None:
    latents = nn.Parameter(inputs(10, 16))
    with torch.no_grad(), collect(nn.Sequential(layer := nn.Linear(16, 4))):
        layer(latents)
        torch.utils.swap_tensors(latents, nn.Parameter(inputs(10, 16)))


def test_compiled_models_have_the_same_statistics() -> None:
    """The first call is compiled while it is watched."""
    model, batches = Both(lambda x: x), [inputs(10, 16, seed=i) for i in range(3)]
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), collect(model) as collector:
        for x in batches:
            compiled(x)
    exact = torch.cat(batches).double()
    for name in ("q", "k"):
        one = collector.stats()[name]
        assert one.count == 30
        torch.testing.assert_close(one.second, exact.square().mean(0), rtol=1e-13, atol=0)


def test_compilers_don_t_see_the_hooks() -> None:
    """What they make of sums that are equal may be one tensor, to which every layer adds."""
    seen: list[bool] = []
    hook = uncompiled(lambda *args: seen.append(torch.compiler.is_compiling()))
    (layer := nn.Linear(16, 4)).register_forward_pre_hook(hook)
    torch.compile(nn.Sequential(layer), backend="eager")(inputs(10, 16))
    assert seen == [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_experts_are_gathered_in_groups(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("lrq.calibration.experts.GROUP", 8 * 7)
    rows = normal(20, 8).to(dtype)
    order, counts = torch.randperm(20), [3, 0, 4, 12, 1, 0]
    groups = list(Routed(rows, order, counts).groups())
    assert [each for _, each in groups] == [[3, 0, 4, 0, 0, 0], [0, 0, 0, 12, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert torch.equal(torch.cat([part for part, _ in groups]), rows[order])


@pytest.mark.gpu
def test_what_torch_refuses_on_a_gpu_is_not_asked_of_it() -> None:
    """Sums of float16, and histograms where algorithms must say that they are deterministic."""
    x, stats = inputs(300, 64).half().cuda(), []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cuda.matmul.allow_fp16_accumulation = deterministic
        try:
            one = Accumulator(64)
            one.update(x)
            Bank([bank := Accumulator(64), Accumulator(64)]).update(x.double(), [200, 100])
            stats.append((one.result(), bank.result()))
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cuda.matmul.allow_fp16_accumulation = False
    for a, b in zip(*stats, strict=True):
        assert a is not None and b is not None and torch.equal(a.histogram, b.histogram)
        torch.testing.assert_close(a.second, b.second, rtol=1e-6, atol=0)
