"""The forward pass: chunks of prompts and single tokens of decodes in one batch, over a KV cache in slots."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kairos.adapters.torch_engine.kv import KvSlots
from kairos.adapters.torch_engine.shape import Shape
from kairos.adapters.torch_engine.weights import Layer, Weights


class Chunk(NamedTuple):
    """The tokens of one sequence in a step: part of a prompt, or the last token of one in decode."""

    slot: int
    start: int
    """Its tokens that are in the KV cache already."""
    ids: Sequence[int]


class Model:
    """A transformer with its KV cache. One thread at a time."""

    def __init__(self, shape: Shape, weights: Weights, cache: KvSlots) -> None:
        self.shape, self.cache = shape, cache
        self._weights = weights
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        angles = torch.arange(cache.slot_tokens, dtype=torch.float64)[:, None] * shape.rope_theta**-half
        both = torch.cat((angles, angles), -1)  # (tokens, head_dim)
        self._cos, self._sin = (f(both).to(self.device, self.dtype)[:, None] for f in (torch.cos, torch.sin))

    def step(self, chunks: Sequence[Chunk]) -> list[int]:
        """Run one step; the likeliest token after the last one of each chunk."""
        with torch.inference_mode():
            likeliest: list[int] = self._logits(chunks).argmax(-1).tolist()
        return likeliest

    def _logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """(chunks, vocab)"""
        ids = torch.tensor([token for chunk in chunks for token in chunk.ids], device=self.device)
        places = torch.cat([torch.arange(c.start, c.start + len(c.ids), device=self.device) for c in chunks])
        ends = torch.tensor([len(chunk.ids) for chunk in chunks], device=self.device).cumsum(0)
        cos, sin = self._cos[places], self._sin[places]  # (n, 1, head_dim)
        masks = [self._mask(chunk) for chunk in chunks]
        x = self._weights.embedding[ids]  # (n, hidden)
        for number, layer in enumerate(self._weights.layers):
            x = x + self._attention(number, layer, self._norm(x, layer.attention_norm), chunks, masks, cos, sin)
            gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return F.linear(self._norm(x[ends - 1], self._weights.norm), self._weights.head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.shape.norm_eps)

    def _mask(self, chunk: Chunk) -> Tensor | None:
        """What the tokens of a chunk may look at, (group * n, start + n); None: everything."""
        n = len(chunk.ids)
        if n == 1:
            return None
        seen = torch.ones(n, chunk.start + n, dtype=torch.bool, device=self.device).tril_(chunk.start)
        return seen.repeat(self.shape.heads // self.shape.kv_heads, 1)

    def _attention(
        self,
        number: int,
        layer: Layer,
        x: Tensor,
        chunks: Sequence[Chunk],
        masks: Sequence[Tensor | None],
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        shape = self.shape
        n, group = len(x), shape.heads // shape.kv_heads
        qkv = F.linear(x, layer.qkv).view(n, -1, shape.head_dim)
        q, k, v = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)  # (n, heads, head_dim)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        told = torch.empty(n, shape.kv_heads, group, shape.head_dim, device=self.device, dtype=self.dtype)
        first = 0
        for chunk, mask in zip(chunks, masks, strict=True):
            last = first + len(chunk.ids)
            keys, values = self.cache.put(number, chunk.slot, chunk.start, k[first:last], v[first:last])
            # the heads that share a KV head are one batch of queries: (kv_heads, group * n, head_dim)
            asked = q[first:last].unflatten(1, (shape.kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
            found = F.scaled_dot_product_attention(asked[None], keys[None], values[None], attn_mask=mask)[0]
            told[first:last] = found.unflatten(1, (group, -1)).permute(2, 0, 1, 3)
            first = last
        return F.linear(told.view(n, -1), layer.out)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in Llama's layout: the first half of a head turns with the second."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
