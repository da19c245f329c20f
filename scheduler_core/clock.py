"""Where time comes from. Policies never see a clock; whoever calls them does."""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic seconds."""

    def now_s(self) -> float:
        """Seconds since some fixed origin."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Seconds since some fixed origin."""
        return time.monotonic()
