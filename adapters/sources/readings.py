"""What an engine says of itself at a moment, and what two readings say of the time between them."""

from dataclasses import dataclass, field

from kairos.scheduler_core.telemetry import SampleRow


@dataclass(frozen=True, slots=True)
class Reading:
    """Figures by their field of `SampleRow`; what the engine does not say is not there."""

    now: dict[str, float] = field(default_factory=dict)
    """At this moment."""
    totals: dict[str, float] = field(default_factory=dict)
    """Since the engine started."""
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Since the engine started: a sum, and over how many."""

    def __bool__(self) -> bool:
        return bool(self.now or self.totals or self.means)

    def __or__(self, other: "Reading") -> "Reading":
        """Both; where both say something, the other one."""
        return Reading(self.now | other.now, self.totals | other.totals, self.means | other.means)

    def follows(self, before: "Reading") -> bool:
        """Whether the engine ran from one to the other: after a restart it counts from 0 again."""
        risen = all(self.totals[name] >= total for name, total in before.totals.items() if name in self.totals)
        return risen and all(self.means[name][1] >= n for name, (_, n) in before.means.items() if name in self.means)


_SHARES = ("kv_cache_usage", "prefix_hit_ratio")


def sample_of(
    instance: str, engine: str, at_s: float, reading: Reading, before: Reading | None, interval_s: float
) -> SampleRow:
    """The sample of a reading.

    Args:
        instance: whose.
        engine: its name.
        at_s: when it was read, UTC epoch seconds.
        reading: what was read.
        before: the reading before; None: there is none.
        interval_s: the time between them.
    """
    fields: dict[str, float] = dict(reading.now)
    follows = before is not None and reading.follows(before)
    if before is not None and follows:
        fields["interval_s"] = interval_s
        fields |= {name: total - before.totals[name] for name, total in reading.totals.items() if name in before.totals}
        for name, (total, n) in reading.means.items():
            total_before, n_before = before.means.get(name, (total, n))
            if n > n_before:
                fields[name] = max(0.0, (total - total_before) / (n - n_before))
    for name in _SHARES:
        if name in fields:
            fields[name] = min(1.0, max(0.0, fields[name]))
    values = {name: int(value) if name in _WHOLE else value for name, value in fields.items()}
    return SampleRow(instance=instance, at_s=at_s, engine=engine, **values)  # type: ignore[arg-type]


_WHOLE = frozenset(
    {
        *("requests_running", "requests_waiting", "finished_requests", "prompt_tokens", "output_tokens"),
        *("preemptions", "kv_expired", "failed_transfers", "decode_steps"),
    }
)
