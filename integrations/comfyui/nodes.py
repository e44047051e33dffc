"""Two nodes: one watches a diffusion model while it samples, one saves what it saw when the samples are there.

    Load Diffusion Model -> lrq: collect inputs -> KSampler -> lrq: save statistics -> VAE Decode

The model must be the high-precision original. Statistics are named as the keys of its file, as far as ComfyUI tells
them: without the prefix ``model.diffusion_model.``, which ``lrq convert --calib`` finds by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrq.calibration import Collector, collect
from lrq.calibration.stats import load_stats
from lrq.errors import InputError

SECOND_MOMENTS = {"whole": {}, "leading directions": {"gram_limit": 0}, "diagonal": {"gram_limit": 0, "rank": 0}}
"""What is kept of the second moments, and options of the collector: whole matrices take most memory."""


class CollectInputs:
    """The model, whose linear layers are watched while it runs, and what they saw."""

    CATEGORY = "lrq"
    FUNCTION = "watch"
    RETURN_TYPES = ("MODEL", "LRQ_INPUTS")
    RETURN_NAMES = ("model", "inputs")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "model": ("MODEL",),
                "second_moments": (list(SECOND_MOMENTS), {"default": "leading directions"}),
                "layers": ("STRING", {"default": "", "tooltip": "Regular expression of layers; empty: all."}),
            }
        }

    def watch(self, model: Any, second_moments: str, layers: str) -> tuple[Any, Collector]:
        """A copy of the model's patcher whose calls are watched; a wrapper that is there is called inside."""
        patched = model.clone()
        inputs = collect(patched.model.diffusion_model, layers or None, **SECOND_MOMENTS[second_moments])
        inner = patched.model_options.get("model_function_wrapper")

        def watched(apply_model: Any, args: dict[str, Any]) -> Any:
            with inputs:
                if inner is not None:
                    return inner(apply_model, args)
                return apply_model(args["input"], args["timestep"], **args["c"])

        patched.set_model_unet_function_wrapper(watched)
        return patched, inputs


class SaveStatistics:
    """Saves what the layers saw; the samples pass through, so that it runs behind the sampler."""

    CATEGORY = "lrq"
    FUNCTION = "save"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "inputs": ("LRQ_INPUTS",),
                "samples": ("LATENT",),
                "path": ("STRING", {"default": "stats.safetensors"}),
            }
        }

    def save(self, inputs: Collector, samples: Any, path: str) -> tuple[Any]:
        """Write the file into ComfyUI's output folder, or a folder in it; a workflow of others can't aim elsewhere.

        Raises:
            InputError: a path that leads out of it, or a file there that holds no statistics.
        """
        folder = _output_folder().resolve()
        target = (folder / path).resolve()
        if not target.is_relative_to(folder) or target == folder:
            raise InputError(f"{path}: is not in ComfyUI's output folder; name a file in it")
        if target.exists():
            # Raises for what lrq calibrate would not read.
            load_stats(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        inputs.save(target, source="ComfyUI")
        return (samples,)


def _output_folder() -> Path:
    import folder_paths  # ComfyUI's own module

    return Path(folder_paths.get_output_directory())


NODE_CLASS_MAPPINGS = {"LrqCollectInputs": CollectInputs, "LrqSaveStatistics": SaveStatistics}
NODE_DISPLAY_NAME_MAPPINGS = {"LrqCollectInputs": "lrq: collect inputs", "LrqSaveStatistics": "lrq: save statistics"}
