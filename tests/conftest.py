"""Marks and real models that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def digits() -> Path:
    """The small trained diffusion transformer, bf16."""
    return ROOT / "tests" / "fixtures" / "digits_dit" / "model.safetensors"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, float32."""
    import real_models

    return real_models.minilm_folder() / "model.safetensors"
