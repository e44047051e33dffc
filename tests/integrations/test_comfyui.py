"""The ComfyUI nodes, against a stub of the interface that ComfyUI documents for custom nodes and model patchers."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpoints import convert, load, normal, same_bytes, save
from lrq.calibration import load_stats
from lrq.errors import InputError

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"


class DiffusionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.fc(x + context) * timesteps


class ModelPatcher:
    """What nodes are given as MODEL: ``clone``, ``model_options``, ``set_model_unet_function_wrapper``."""

    def __init__(self) -> None:
        self.model = types.SimpleNamespace(diffusion_model=DiffusionModel())
        self.model_options: dict[str, Any] = {}

    def clone(self) -> ModelPatcher:
        other = copy.copy(self)
        other.model_options = dict(self.model_options)
        return other

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper


def sampled(patcher: ModelPatcher, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """One call of the model as the sampler makes it (``comfy.samplers.calc_cond_batch``)."""

    def apply_model(x: torch.Tensor, t: torch.Tensor, c_crossattn: torch.Tensor) -> torch.Tensor:
        return patcher.model.diffusion_model(x, t, c_crossattn)

    timestep, c = torch.tensor(0.5), {"c_crossattn": context}
    wrapper = patcher.model_options.get("model_function_wrapper")
    with torch.inference_mode():
        if wrapper is None:
            return apply_model(x, timestep, **c)
        return wrapper(apply_model, {"input": x, "timestep": timestep, "c": c, "cond_or_uncond": [0]})


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, loaded as ComfyUI loads a custom node: by path, under a name of its own."""
    paths = types.ModuleType("folder_paths")
    paths.get_output_directory = lambda: str(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    spec = importlib.util.spec_from_file_location(
        "lrq_nodes", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lrq_nodes", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("lrq_nodes.nodes", None)


def test_every_node_keeps_the_interface(nodes: Any) -> None:
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        names = node.INPUT_TYPES()["required"]
        function = getattr(node, node.FUNCTION)
        assert set(function.__code__.co_varnames[1 : function.__code__.co_argcount]) == names.keys()
        assert all(isinstance(kind, tuple) and isinstance(kind[0], str | list) for kind in names.values())
        assert isinstance(node.CATEGORY, str) and all(isinstance(kind, str) for kind in node.RETURN_TYPES)
        assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)


@pytest.mark.parametrize("moments", ["whole", "leading directions", "diagonal"])
def test_what_a_sampler_feeds_is_saved_and_corrects_a_bias(nodes: Any, tmp_path: Path, moments: str) -> None:
    collect_node, save_node = (node() for node in nodes.NODE_CLASS_MAPPINGS.values())
    model, x, context = ModelPatcher(), normal(2, 5, 32), normal(2, 5, 32, seed=1) + 3
    plain = sampled(model, x, context)
    patched, inputs = collect_node.watch(model, moments, "")
    assert torch.equal(sampled(patched, x, context), plain)
    sampled(model, 100 * x, context)
    samples = {"samples": plain}
    assert save_node.save(inputs, samples, "stats.safetensors") == (samples,)
    stats = load_stats(tmp_path / "stats.safetensors")
    seen = (x + context).reshape(-1, 32).double()
    assert stats.measured and list(stats) == ["fc"] and stats["fc"].count == 10
    torch.testing.assert_close(stats["fc"].mean, seen.mean(0))
    kinds = {"whole": (False, True), "leading directions": (True, False), "diagonal": (True, True)}
    assert (stats["fc"].gram is None, stats["fc"].vectors is None) == kinds[moments]
    state = {f"model.diffusion_model.{k}": v.data for k, v in model.model.diffusion_model.state_dict().items()}
    source = save(tmp_path / "in.safetensors", state)
    said = convert(source, tmp_path / "out.safetensors", "--nvfp4", "--calib", tmp_path / "stats.safetensors")
    assert "bias correction: 1 bias" in said.output
    name = "model.diffusion_model.fc.bias"
    assert not same_bytes(load(tmp_path / "out.safetensors").tensors[name], state[name])


def test_another_wrapper_goes_on_working(nodes: Any) -> None:
    model, calls = ModelPatcher(), []

    def other(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        calls.append(args["cond_or_uncond"])
        return 2 * apply_model(args["input"], args["timestep"], **args["c"])

    plain = sampled(model, normal(1, 4, 32), normal(1, 4, 32))
    model.set_model_unet_function_wrapper(other)
    patched, inputs = nodes.NODE_CLASS_MAPPINGS["LrqCollectInputs"]().watch(model, "diagonal", "^fc$")
    assert torch.equal(sampled(patched, normal(1, 4, 32), normal(1, 4, 32)), 2 * plain)
    assert calls == [[0]] and inputs.tokens == 4
    assert model.model_options["model_function_wrapper"] is other


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("../elsewhere.safetensors", "is not in ComfyUI's output folder"),
        ("/tmp/elsewhere.safetensors", "is not in ComfyUI's output folder"),
        ("", "is not in ComfyUI's output folder"),
        ("model.safetensors", "holds no input statistics"),
    ],
)
def test_a_workflow_can_aim_at_no_other_file(nodes: Any, tmp_path: Path, path: str, words: str) -> None:
    checkpoint = save(tmp_path / "model.safetensors", {"a.weight": normal(8, 8)})
    before = checkpoint.read_bytes()
    with pytest.raises(InputError, match=words):
        nodes.NODE_CLASS_MAPPINGS["LrqSaveStatistics"]().save(None, None, path)
    assert checkpoint.read_bytes() == before
