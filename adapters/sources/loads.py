"""SGLang's `GET /v1/loads` into a reading.

`decode_moments` are running sums over decode steps: [steps, sum of batch, sum of microseconds, ...]. Two readings give
how many steps there were, their mean batch and their mean time.

Source of the fields: SGLang 0.5.23, `GET /v1/loads`.
"""

import msgspec

from kairos.adapters.sources.readings import Reading
from kairos.scheduler_core.errors import TelemetryError


class Load(msgspec.Struct, frozen=True):
    """Of one data-parallel rank, as far as it matters here."""

    num_running_reqs: int | None = None
    num_waiting_reqs: int | None = None
    token_usage: float | None = None
    decode_moments: list[float] | None = None


class Loads(msgspec.Struct, frozen=True):
    """The answer."""

    loads: list[Load]


def reading_of_loads(body: bytes) -> Reading:
    """What the answer says, over all ranks.

    Raises:
        TelemetryError: it is no such answer.
    """
    try:
        loads = msgspec.json.decode(body, type=Loads).loads
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise TelemetryError(f"its loads cannot be read: {error}") from None
    running = [load.num_running_reqs for load in loads if load.num_running_reqs is not None]
    waiting = [load.num_waiting_reqs for load in loads if load.num_waiting_reqs is not None]
    usage = [load.token_usage for load in loads if load.token_usage is not None]
    moments = [load.decode_moments for load in loads if load.decode_moments and len(load.decode_moments) >= 3]
    now: dict[str, float] = {}
    if running:
        now["requests_running"] = sum(running)
    if waiting:
        now["requests_waiting"] = sum(waiting)
    if usage:
        now["kv_cache_usage"] = sum(usage) / len(usage)
    if not moments:
        return Reading(now)
    steps, batches, microseconds = (sum(rank[place] for rank in moments) for place in range(3))
    means = {"decode_batch": (batches, steps), "decode_step_ms": (microseconds / 1e3, steps)}
    return Reading(now, {"decode_steps": steps}, means)
