"""A policy for the worst day; the engine's process imports it."""

from collections.abc import Sequence


class Unreliable:
    """Raises, invents and stalls in turn."""

    def __init__(self) -> None:
        self.calls = 0

    def order(self, view: object) -> Sequence[str]:
        self.calls += 1
        if self.calls % 3 == 0:
            raise RuntimeError("no idea")
        if self.calls % 3 == 1:
            return ["nobody"]
        while True:
            pass
