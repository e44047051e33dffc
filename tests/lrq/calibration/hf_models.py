"""Hugging Face folders of tiny models with random weights, and a tokenizer of three words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

TEXTS = "a b c\na a a b c c c b\nb\n"
TOKENS = 12
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
PLACES = {"max_position_embeddings": 32}
VISION = {**SIZES, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SIZES | PLACES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "umt5": ("UMT5EncoderModel", "UMT5Config", T5),
    "bart": ("BartModel", "BartConfig", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, **PLACES}),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": {"vocab_size": 8, **SIZES, **PLACES}, "vision_config": VISION}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4}
        | {"moe_intermediate_size": 16, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**SIZES, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**SIZES, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
        | {"topk_group": 2, "first_k_dense_replace": 0, "moe_intermediate_size": 16, "kv_lora_rank": 16}
        | {"q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4}),
}
"""Class, class of the config, and settings."""


def make(folder: Path, name: str, special: dict[str, str] = SPECIAL, **settings: Any) -> Path:
    """Save a model and the tokenizer, and beside the folder ``texts.txt``."""
    kind, config, common = MODELS[name]
    torch.manual_seed(0)
    vocabulary = {} if name == "clip" else {"vocab_size": 8}
    transformers.logging.disable_progress_bar()
    model = getattr(transformers, kind)(getattr(transformers, config)(**(vocabulary | common | settings)))
    model.save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    folder.with_name("texts.txt").write_text(TEXTS)
    return folder


def configure(folder: Path, **settings: Any) -> None:
    """Change ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def replace_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
