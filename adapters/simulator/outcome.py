"""What becomes of each request while a run goes on: plain lists that the instances write into."""

from array import array
from dataclasses import dataclass, field

from kairos.adapters.simulator.tables import STATUSES, Workload

FINISHED, REJECTED, FAILED, UNFINISHED = range(len(STATUSES))


@dataclass(slots=True)
class Outcome:
    """Per request, indexed by row; what the instances write as things happen."""

    output_tokens: list[int]
    cached_tokens: list[int]
    prefill_instance: list[int]
    decode_instance: list[int]
    prefill_start_s: list[float]
    first_token_s: list[float]
    decode_ready_s: list[float]
    last_token_s: list[float]
    max_itl_s: list[float]
    tokens_in_time: list[int]
    status: list[int]
    predicted_prefill_s: list[float]
    actual_prefill_s: list[float]
    itl_s: "array[float]" = field(default_factory=lambda: array("d"))
    itl_row: "array[int]" = field(default_factory=lambda: array("q"))
    """Whose gap each of `itl_s` is."""

    @classmethod
    def of(cls, workload: Workload) -> "Outcome":
        """Nothing has happened yet."""
        n = len(workload)
        nan = float("nan")
        return cls(
            output_tokens=workload.output_tokens.tolist(),
            cached_tokens=[0] * n,
            prefill_instance=[-1] * n,
            decode_instance=[-1] * n,
            prefill_start_s=[nan] * n,
            first_token_s=[nan] * n,
            decode_ready_s=[nan] * n,
            last_token_s=[nan] * n,
            max_itl_s=[nan] * n,
            tokens_in_time=[0] * n,
            status=[UNFINISHED] * n,
            predicted_prefill_s=[nan] * n,
            actual_prefill_s=[nan] * n,
        )
