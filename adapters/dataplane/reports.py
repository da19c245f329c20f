"""What a data plane reports of a slot of an experiment, as `PUT /experiments/{id}/reports/{data plane}` takes it."""

from collections.abc import Mapping

import msgspec


class ArmReport(msgspec.Struct):
    """What was done for the requests of one arm so far in a slot."""

    requests: int = 0
    decisions: int = 0
    counted_decisions: int = 0
    wrong_arm: int = 0
    exceptions: int = 0
    fallbacks: int = 0
    decision_p99_us: float = 0.0
    worst_wait_s: float = 0.0


class SlotReport(msgspec.Struct):
    """The same of both arms; None: the slot has none of it."""

    slot_start_s: float
    champion: ArmReport | None = None
    challenger: ArmReport | None = None
    healthy: bool = True
    """False: an instance that served the challenger was lost in this slot."""

    def arm(self, challenger: bool) -> ArmReport:
        """That of an arm, made where there is none yet."""
        if challenger:
            self.challenger = self.challenger or ArmReport()
            return self.challenger
        self.champion = self.champion or ArmReport()
        return self.champion


def exceptions_among(fallbacks: Mapping[str, int]) -> int:
    """Of all failures of policies, those that a policy raised itself."""
    return sum(count for name, count in fallbacks.items() if not name.endswith(": PolicyError"))
