"""The weights of a model: drawn, or read from a folder with safetensors."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kairos.adapters.torch_engine.shape import Shape
from kairos.scheduler_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. Matrices are (out, in)."""

    attention_norm: Tensor
    qkv: Tensor
    """Queries, keys and values, one below the other."""
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    """Gate and up, one below the other."""
    down: Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model."""

    embedding: Tensor
    """(vocab, hidden)"""
    layers: list[Layer]
    norm: Tensor
    head: Tensor
    """(vocab, hidden)"""


def drawn(shape: Shape, seed: int, device: torch.device, dtype: torch.dtype) -> Weights:
    """Random weights, scaled so that every layer changes what passes through it; the same for the same seed."""
    chance = torch.Generator(device).manual_seed(seed)

    def matrix(out: int, into: int, spread: float | None = None) -> Tensor:
        numbers = torch.randn(out, into, generator=chance, device=device, dtype=dtype)
        return numbers.mul_(into**-0.5 if spread is None else spread)

    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ones = torch.ones(shape.hidden, device=device, dtype=dtype)
    embedding = matrix(shape.vocab, shape.hidden, 1.0)
    layers = [
        Layer(
            ones,
            matrix(heads + 2 * kv_heads, shape.hidden),
            matrix(shape.hidden, heads),
            ones,
            matrix(2 * shape.intermediate, shape.hidden),
            matrix(shape.hidden, shape.intermediate),
        )
        for _ in range(shape.layers)
    ]
    head = embedding if shape.ties_embeddings else matrix(shape.vocab, shape.hidden)
    return Weights(embedding, layers, ones, head)


def loaded(shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype) -> Weights:
    """The weights in the safetensors files of a folder, by Hugging Face's names for Llama.

    Raises:
        ConfigError: a weight is missing, or no file can be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            found |= load_file(path, device=str(device))
    except (SafetensorError, OSError) as problem:
        raise ConfigError(f"cannot read the weights in {folder}: {problem}") from None

    def named(*names: str) -> Tensor:
        try:
            parts = [found.pop(f"{name}.weight") for name in names]
        except KeyError as missing:
            raise ConfigError(
                f"{folder} has no weight {missing}; it needs a whole Llama model in safetensors"
            ) from None
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype)

    embedding = named("model.embed_tokens")
    layers = []
    for n in range(shape.layers):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        layers.append(
            Layer(
                named(f"model.layers.{n}.input_layernorm"),
                named(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                named(f"{attention}.o_proj"),
                named(f"model.layers.{n}.post_attention_layernorm"),
                named(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                named(f"{mlp}.down_proj"),
            )
        )
    return Weights(embedding, layers, named("model.norm"), embedding if shape.ties_embeddings else named("lm_head"))
