"""results.json as the report reads it: the fixed part is needed, every addition may be absent.

Unknown fields are ignored, so that a report can be made from the results of a later version.
"""

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from kairos.scheduler_core.errors import InputError


class Interval(msgspec.Struct, frozen=True):
    """A mean with its 95 % interval over n time blocks; None where it could not be computed."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: float | None = None

    @property
    def known(self) -> bool:
        """Whether there is an interval, not a mean alone."""
        return self.low is not None and self.high is not None


Number = Interval | float | None
UNKNOWN = Interval()


def interval(value: Number) -> Interval:
    """Any form of a number as an interval; what is not finite is unknown."""
    if value is None:
        return UNKNOWN
    if not isinstance(value, Interval):
        return Interval(_finite(value))
    return Interval(_finite(value.mean), _finite(value.low), _finite(value.high), _finite(value.n))


class Metrics(msgspec.Struct, frozen=True):
    """The metrics of one cell. Shares 0..1, times in seconds, except ``decision_us``.

    A ``by_...`` group maps a name to an attainment, or to a mapping of attainments by metric: see ``of_group``.
    """

    ttft_attainment: Number = None
    tpot_attainment: Number = None
    slo_attainment: Number = None
    goodput_per_s: Number = None
    output_tokens_per_s: Number = None
    ttft_s: dict[str, Number] = {}
    tpot_s: dict[str, Number] = {}
    itl_s: dict[str, Number] = {}
    worst_wait_s: Number = None
    fluidity: Number = None
    rejected: Number = None
    unfinished: Number = None
    by_prompt_quartile: Any = None
    by_class: Any = None
    by_tenant: Any = None
    decision_us: dict[str, Number] = {}
    predictor: dict[str, Number] = {}

    def attainment(self, metric: str) -> Interval:
        """``ttft_attainment``, ``tpot_attainment`` or ``slo_attainment``."""
        return interval(getattr(self, metric))

    def of_group(self, group: str, metric: str) -> dict[str, Interval]:
        """Attainment per member of ``by_prompt_quartile``, ``by_class`` or ``by_tenant``; empty where there is none."""
        members = getattr(self, group) or {}
        if isinstance(members, list):
            members = {str(i + 1): member for i, member in enumerate(members)}
        found = {}
        for name, value in members.items():
            of_metric = isinstance(value, dict) and not value.keys() & {"mean", "low", "high", "n"}
            number: Number = msgspec.convert(value.get(metric) if of_metric else value, Number)
            if interval(number).mean is not None:
                found[str(name)] = interval(number)
        return found


class Quantiles(msgspec.Struct, frozen=True):
    """A quantile function: the share ``probabilities[i]`` has at most ``values[i]``; None: it never came."""

    probabilities: list[float] = []
    values: list[float | None] = []


class PredictedActual(msgspec.Struct, frozen=True):
    """One bin: medians of what was predicted and what it took, over n requests."""

    predicted_s: float
    actual_s: float
    n: int = 1


class Cell(msgspec.Struct, frozen=True):
    """One strategy on one trace with one target at one load (None: as recorded)."""

    trace: str
    strategy: str
    metrics: Metrics
    target: str | None = None
    load: float | None = None
    distributions: dict[str, Quantiles] = {}
    predicted_vs_actual: list[PredictedActual] = []
    sentence: str = ""


class Bound(msgspec.Struct, frozen=True):
    """What no scheduler exceeds, for one seed."""

    trace: str
    ttft_attainment: float | None = None
    slo_attainment: float | None = None
    target: str | None = None
    load: float | None = None
    seed: int | None = None


class Pair(msgspec.Struct, frozen=True):
    """a minus b on the same arrivals and noise, in percentage points."""

    trace: str
    a: str
    b: str
    metric: str
    difference_pp: Number = None
    verdict: str = ""
    target: str | None = None
    load: float | None = None


class Step(msgspec.Struct, frozen=True):
    """One prefill step of the instance of a timeline."""

    start_s: float
    end_s: float
    request_ids: list[str | int] = []
    new_tokens: int = 0


class TimelineRequest(msgspec.Struct, frozen=True):
    """One request of a timeline; times on the clock of the run."""

    request_id: str | int
    arrival_s: float
    deadline_s: float | None = None
    start_s: float | None = None
    first_token_s: float | None = None
    prompt_tokens: int = 0
    ttft_met: bool = False


class Timeline(msgspec.Struct, frozen=True):
    """What one instance ran in one window, under one strategy."""

    trace: str
    strategy: str
    instance: str
    start_s: float
    end_s: float
    steps: list[Step]
    requests: list[TimelineRequest]
    target: str | None = None
    load: float | None = None
    seed: int | None = None
    rule: str = ""
    blocker: str | int | None = None


class Meta(msgspec.Struct, frozen=True):
    """Where the results come from."""

    version: str = ""
    command: str | list[str] = ""
    seeds: list[int] | int | None = None
    config: Any = None
    baseline: str | None = None
    stages: str = "all"
    strategies: dict[str, str] = {}
    synthetic: dict[str, bool] = {}
    notes: list[str] = []
    sentences: list[str] = []


class Results(msgspec.Struct, frozen=True):
    """results.json."""

    cells: list[Cell]
    meta: Meta = Meta()
    bounds: list[Bound] = []
    pairs: list[Pair] = []
    timelines: list[Timeline] = []


def read_file(path: Path) -> dict[str, Any]:
    """results.json, parsed.

    Raises:
        InputError: there is no such file, or it is not a JSON object.
    """
    try:
        results = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; `kairos compare --out DIR` writes it") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; write it again with `kairos compare`") from error
    if not isinstance(results, dict):
        raise InputError(f"{path} holds no JSON object; write it again with `kairos compare`")
    return results


def read_results(results: dict[str, Any]) -> Results:
    """Parsed results.json with its types checked.

    Raises:
        InputError: a needed field is missing or has another type, with its path; or there is no cell.
    """
    try:
        read = msgspec.convert(results, Results)
        for cell in read.cells:
            for group in ("by_prompt_quartile", "by_class", "by_tenant"):
                cell.metrics.of_group(group, "ttft_attainment")
    except (msgspec.ValidationError, AttributeError) as error:
        raise InputError(f"results.json cannot be read: {error}; write it with `kairos compare`") from error
    if not read.cells:
        raise InputError("results.json has no cell: nothing was compared; run `kairos compare` on at least one trace")
    return read


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
