"""Torch workers for tests, in this event loop, and what their model computes when nobody batches or caches."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F

from kairos.adapters.embedded.settings import Coefficients, EngineSettings, Linear
from kairos.adapters.emulator.worker import EmulatedWorker
from kairos.adapters.torch_engine.build import ModelOptions
from kairos.adapters.torch_engine.engine import TorchEngine
from kairos.adapters.torch_engine.process import TorchOptions, torch_worker
from kairos.adapters.torch_engine.shape import SHAPES, Shape
from kairos.adapters.torch_engine.weights import Weights, drawn
from kairos.scheduler_core.telemetry import StepRecord

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")
LINEAR = Linear(Coefficients(a_s=1e-3, b_s=2e-5), Coefficients(a_s=1e-3, b_s=1e-4))
"""About what the tiny model takes."""


def torch_options(status_dir: Path, **changes: Any) -> TorchOptions:
    """A mixed worker with the tiny model; `changes` are of the options, of the model's, or of the settings."""
    known = {
        kind: {name: changes.pop(name) for name in [*changes] if name in kind.__annotations__}
        for kind in (ModelOptions, EngineSettings)
    }
    model = ModelOptions(**{"model": "tiny", "slots": 8, "slot_tokens": 1024} | known[ModelOptions])
    settings = EngineSettings(**{"linear": LINEAR, "status_dir": str(status_dir)} | known[EngineSettings])
    return TorchOptions(**{"model": model, "role": "mixed", "settings": settings, "chunk_tokens": 64} | changes)


@asynccontextmanager
async def torch_workers(
    *wanted: TorchOptions, on_step: Callable[[StepRecord], None] | None = None
) -> AsyncIterator[list[tuple[EmulatedWorker, TorchEngine]]]:
    """Running workers with their engines."""
    started = [torch_worker(each, on_step) for each in wanted]
    try:
        for worker, _ in started:
            await worker.start()
        yield started
    finally:
        for worker, _ in started:
            await worker.stop()


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    """A prompt of that length."""
    chance = torch.Generator().manual_seed(1000 * seed + tokens)
    told: list[int] = torch.randint(TINY.vocab, (tokens,), generator=chance).tolist()
    return told


@cache
def tiny_weights() -> Weights:
    """Those of the tiny model that workers draw."""
    return drawn(TINY, 0, CPU, torch.float32)


def plainly(
    prompt: Sequence[int], output_tokens: int, shape: Shape = TINY, weights: Weights | None = None
) -> list[int]:
    """The greedy continuation by a forward pass over the whole context for each token."""
    weights = weights or drawn(shape, 0, CPU, torch.float32)
    ids = list(prompt)
    for _ in range(output_tokens):
        ids.append(int(_logits(shape, weights, torch.tensor(ids))[-1].argmax()))
    return ids[len(prompt) :]


def _logits(shape: Shape, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    n, d = len(ids), shape.head_dim
    turn = torch.arange(n)[:, None] * shape.rope_theta ** (-torch.arange(0, d, 2) / d)[None]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + shape.norm_eps).sqrt() * weight

    def rotated(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        cos, sin = turn.cos()[:, None], turn.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = weights.embedding[ids]
    for layer in weights.layers:
        h = norm(x, layer.attention_norm)
        queries, keys = shape.heads * d, shape.kv_heads * d
        q = rotated((h @ layer.qkv[:queries].T).view(n, shape.heads, d))
        k = rotated((h @ layer.qkv[queries : queries + keys].T).view(n, shape.kv_heads, d))
        v = (h @ layer.qkv[queries + keys :].T).view(n, shape.kv_heads, d)
        heads = []
        for head in range(shape.heads):
            of = head // (shape.heads // shape.kv_heads)
            scores = q[:, head] @ k[:, of].T / d**0.5
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, of])
        x = x + torch.cat(heads, -1) @ layer.out.T
        h = norm(x, layer.mlp_norm)
        gate, up = layer.gate_up[: shape.intermediate], layer.gate_up[shape.intermediate :]
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ layer.down.T
    return norm(x, weights.norm) @ weights.head.T


def config_of(shape: Shape, **changes: Any) -> bytes:
    """A Hugging Face config.json of a shape."""
    told = {
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "rms_norm_eps": shape.norm_eps,
    }
    return msgspec.json.encode(told | changes)
