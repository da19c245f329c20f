"""KV that a prefill worker holds for a decode worker: leases, single use, and waiting for one another.

One desk serves the three handshakes. NIXL: prefill ends, the KV is held under a lease, a decode worker takes it once.
Mooncake and SGLang: both legs come at once under one key; decode waits for prefill, and with SGLang prefill begins only
when decode has asked.
"""

import asyncio
from dataclasses import dataclass, field


@dataclass(slots=True)
class Held:
    """The KV of one prompt."""

    tokens: int = 0
    kv: bytes = b""
    expires_s: float = float("inf")
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """A decode worker waits for it."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """It is there, or never will be."""
    failed: bool = False


class KvDesk:
    """What one prefill worker holds, by the key that both legs know.

    Args:
        lease_s: how long KV is held that nobody takes and nobody renews.
    """

    def __init__(self, lease_s: float = 30.0) -> None:
        self.lease_s = lease_s
        self._held: dict[str, Held] = {}
        self.expired = 0
        self.invalid_reads = 0
        """Reads of KV that was taken before or had expired: an engine answers 200 with wrong tokens then."""

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held_tokens(self) -> int:
        """KV that waits to be taken."""
        return sum(held.tokens for held in self._held.values())

    def expect(self, key: str) -> Held:
        """The place under a key, made by whichever leg comes first."""
        return self._held.setdefault(key, Held())

    def hold(self, key: str, tokens: int, now_s: float, kv: bytes = b"") -> None:
        """Prefill has ended: the KV is there."""
        held = self.expect(key)
        held.tokens, held.kv = tokens, kv
        held.expires_s = now_s + self.lease_s
        held.settled.set()

    def fail(self, key: str) -> None:
        """Prefill will not end: who waits for it learns so."""
        held = self._held.pop(key, None)
        if held is not None:
            held.failed = True
            held.settled.set()

    def renew(self, key: str, now_s: float) -> None:
        """A heartbeat of a decode worker that steps: two thirds of the lease from now."""
        held = self._held.get(key)
        if held is not None:
            held.expires_s = max(held.expires_s, now_s + self.lease_s * 2 / 3)

    def take(self, key: str, now_s: float) -> bytes | None:
        """Take KV that is there; None, and counted, when it was taken before or has expired."""
        self.sweep(now_s)
        held = self._held.pop(key, None)
        if held is None:
            self.invalid_reads += 1
            return None
        return held.kv

    async def wait_and_take(self, key: str, timeout_s: float) -> bytes | None:
        """Ask for KV that prefill computes now; None when it fails or does not come in time."""
        held = self.expect(key)
        held.asked.set()
        try:
            async with asyncio.timeout(timeout_s):
                await held.settled.wait()
        except TimeoutError:
            held.failed = True
        finally:
            self._held.pop(key, None)
        return None if held.failed else held.kv

    def sweep(self, now_s: float) -> None:
        """Free what has expired."""
        for key in [key for key, held in self._held.items() if held.expires_s < now_s]:
            del self._held[key]
            self.expired += 1
