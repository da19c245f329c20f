"""Faults that an emulated worker shows on purpose."""

import random
from enum import StrEnum

from kairos.scheduler_core.errors import ConfigError


class Fault(StrEnum):
    """What goes wrong with a request."""

    CUT = "cut"
    """the connection ends: before the answer, or in the middle of it"""
    HANG = "hang"
    """nothing is answered, the connection stays open"""
    SSE_ERROR = "sse_error"
    """200, then an error event; without streaming 500"""
    SLOW = "slow"
    """its steps, and so those of the batch it is in, last ten times as long"""
    REFUSE = "refuse"
    """503 at once"""


class Faults:
    """Draws a fault for some requests.

    Args:
        shares: the share of requests of each fault.
    """

    def __init__(self, shares: dict[Fault, float] | None = None, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.set(shares or {})

    def set(self, shares: dict[Fault, float]) -> None:
        """Draw with other shares from now on.

        Raises:
            ConfigError: they are negative or sum to more than 1.
        """
        if any(share < 0 for share in shares.values()) or sum(shares.values()) > 1:
            raise ConfigError(f"shares of faults are from 0 to 1 and sum to at most 1, these are {dict(shares)}")
        self._shares = dict(shares)

    def draw(self) -> Fault | None:
        """The fault of the next request."""
        point = self._random.random()
        for fault, share in self._shares.items():
            point -= share
            if point < 0:
                return fault
        return None

    def early(self) -> bool:
        """Whether a connection is cut before the answer begins."""
        return self._random.random() < 0.5


def parse_faults(texts: list[str]) -> dict[Fault, float]:
    """Shares from `KIND:SHARE`.

    >>> parse_faults(["cut:0.05"])
    {<Fault.CUT: 'cut'>: 0.05}
    """
    shares: dict[Fault, float] = {}
    for text in texts:
        kind, _, share = text.partition(":")
        try:
            shares[Fault(kind)] = float(share)
        except ValueError:
            raise ConfigError(f"cannot read fault '{text}'; write KIND:SHARE with {', '.join(Fault)}") from None
    return shares
