"""The shape of a model of the Llama family: two that ship, or what a Hugging Face `config.json` says."""

import json
from pathlib import Path
from typing import Any

import msgspec

from kairos.scheduler_core.errors import ConfigError, UnknownNameError


class Shape(msgspec.Struct, frozen=True):
    """Sizes of a decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    ties_embeddings: bool = False
    """The output layer is the embedding."""
    end_ids: tuple[int, ...] = ()
    """Tokens after which a sequence ends."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ConfigError(
                f"{self.name}: {self.heads} heads, {self.kv_heads} KV heads, head_dim {self.head_dim}: heads must be a "
                "multiple of KV heads, head_dim even"
            )

    @property
    def kv_numbers_per_token(self) -> int:
        """Numbers in the KV cache for one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


SHAPES = {
    "tiny": Shape("tiny", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=160, vocab=512),
    "small": Shape("small", layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=1536, vocab=1024),
}
"""For tests, and for one core of a CPU: prefill of 1,000 tokens takes some tenths of a second there."""


def shape_of(model: str) -> Shape:
    """The shape that ships under a name, or that of a `config.json` or of the folder that has one.

    Raises:
        ConfigError: there is neither, or it is of a family that this engine does not compute.
    """
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise UnknownNameError("model shape or config.json", model, SHAPES)
    try:
        told = json.loads(path.read_bytes())
        return _shape(path.resolve().parent.name, told)
    except (ValueError, KeyError, TypeError) as problem:
        raise ConfigError(f"cannot read the model shape in {path}: {problem!r}; it needs Llama's config.json") from None


def _shape(name: str, told: dict[str, Any]) -> Shape:
    rope = told.get("rope_parameters") or told.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    wrong = {
        "model_type": told["model_type"] != "llama",
        "rope type": scaling != "default",
        "attention_bias": told.get("attention_bias", False),
        "mlp_bias": told.get("mlp_bias", False),
        "hidden_act": told.get("hidden_act", "silu") != "silu",
    }
    if any(wrong.values()):
        found = ", ".join(field for field, is_wrong in wrong.items() if is_wrong)
        raise ConfigError(f"{name}: {found} in config.json is not Llama's own; this engine computes plain Llama models")
    ends = told.get("eos_token_id")
    heads = told["num_attention_heads"]
    return Shape(
        name=name,
        layers=told["num_hidden_layers"],
        hidden=told["hidden_size"],
        heads=heads,
        kv_heads=told.get("num_key_value_heads") or heads,
        head_dim=told.get("head_dim") or told["hidden_size"] // heads,
        intermediate=told["intermediate_size"],
        vocab=told["vocab_size"],
        rope_theta=float(rope.get("rope_theta") or told.get("rope_theta") or 10_000.0),
        norm_eps=float(told.get("rms_norm_eps", 1e-6)),
        ties_embeddings=bool(told.get("tie_word_embeddings", False)),
        end_ids=() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
    )
