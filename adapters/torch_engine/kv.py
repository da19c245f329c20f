"""The KV cache: one slot a sequence, and how the KV of a prompt leaves one process and enters another."""

import torch
from torch import Tensor

from kairos.adapters.torch_engine.shape import Shape


class KvSlots:
    """Keys and values of `slots` sequences of up to `slot_tokens` tokens.

    On a CPU memory is taken as slots fill.
    """

    def __init__(self, shape: Shape, slots: int, slot_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.slots, self.slot_tokens = slots, slot_tokens
        self._bytes_per_token = shape.kv_numbers_per_token * dtype.itemsize
        self._kv = torch.empty(
            2, shape.layers, slots, shape.kv_heads, slot_tokens, shape.head_dim, device=device, dtype=dtype
        )

    def fill(self) -> None:
        """Put something into every slot, to measure with: numbers that were never written may be slow ones."""
        self._kv.fill_(0.5)

    def put(self, layer: int, slot: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values (n, kv_heads, head_dim) from `start` on; all there are, (kv_heads, end, head_dim)."""
        end = start + len(keys)
        k, v = self._kv[0, layer, slot], self._kv[1, layer, slot]
        k[:, start:end] = keys.transpose(0, 1)
        v[:, start:end] = values.transpose(0, 1)
        return k[:, :end], v[:, :end]

    def dump(self, slot: int, tokens: int) -> bytes:
        """The first `tokens` of a slot as bytes."""
        part = self._kv[:, :, slot, :, :tokens].contiguous().cpu()
        return bytes(part.view(torch.uint8).numpy())

    def load(self, slot: int, tokens: int, kv: bytes) -> None:
        """Fill the first `tokens` of a slot with what `dump` made in a worker with the same model.

        Raises:
            ValueError: it is not as much as these tokens have.
        """
        expected = tokens * self._bytes_per_token
        if len(kv) != expected:
            raise ValueError(f"the KV of {tokens} tokens came as {len(kv)} bytes, here it has {expected}")
        if kv:  # a prompt of one token brings none
            place = self._kv[:, :, slot, :, :tokens]
            place.copy_(torch.frombuffer(bytearray(kv), dtype=place.dtype).view(place.shape))
