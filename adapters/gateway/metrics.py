"""What the gateway counts, and Prometheus text of it. Every name is here (docs/gateway.md)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from kairos.adapters.gateway.calls import Call, Outcome
from kairos.adapters.gateway.instances import LiveInstance, State

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TPOT_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_TENANTS = 50
"""Tenants with a label of their own; the others share one."""

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts by bucket."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Prometheus text."""
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class GatewayMetrics:
    """Counters of one gateway. A request is counted once, when it has ended."""

    def __init__(self) -> None:
        self.outcomes = Counter[tuple[str, str]]()
        """Requests by outcome and code."""
        self.tenants = Counter[str]()
        self.ttft = Histogram(_SECONDS)
        self.tpot = Histogram(_TPOT_SECONDS)
        self.waited = Histogram(_SECONDS)
        self.ttft_met = Counter[str]()
        """Requests by `true` or `false`: whether the first token was in time; without one it was not."""
        self.relayed = Counter[str]()
        """Requests of other paths, by path."""
        self.reloads = Counter[str]()
        self.uncounted = Counter[str]()
        """Prompts that a tokenizer or its chat template did not take, by model."""

    def ended(self, call: Call, outcome: Outcome, code: str) -> None:
        """Count a request."""
        self.outcomes[outcome, code] += 1
        self._count_tenant(call.tenant)
        if call.dispatch_s:
            self.waited.observe(call.dispatch_s - call.arrival_s)
        ttft_s = call.first_token_s - call.arrival_s if call.first_token_s else float("inf")
        self.ttft_met["true" if ttft_s <= call.ttft_target_s and call.first_token_s else "false"] += 1
        if call.first_token_s and call.body.stream:
            self.ttft.observe(ttft_s)
            if call.output_tokens > 1 and call.last_token_s > call.first_token_s:
                self.tpot.observe((call.last_token_s - call.first_token_s) / (call.output_tokens - 1))

    def _count_tenant(self, tenant: str) -> None:
        known = tenant in self.tenants or len(self.tenants) < _TENANTS
        self.tenants[tenant if known else "other"] += 1


def exposition(metrics: GatewayMetrics, gauges: Iterable[tuple[str, str, Labels, float]]) -> str:
    """Prometheus text of the counters, and of gauges told as (name, help, labels, value)."""
    lines: list[str] = []
    counters: list[tuple[str, str, Iterable[tuple[Labels, int]]]] = [
        (
            "kairos_gateway_requests_total",
            "requests that have ended, by outcome and code",
            [((("outcome", o), ("code", c)), n) for (o, c), n in metrics.outcomes.items()],
        ),
        (
            "kairos_gateway_tenant_requests_total",
            "requests that have ended, by tenant",
            [((("tenant", t),), n) for t, n in metrics.tenants.items()],
        ),
        (
            "kairos_gateway_ttft_met_total",
            "requests that have ended, by whether their first token was in time",
            [((("met", met),), n) for met, n in metrics.ttft_met.items()],
        ),
        (
            "kairos_gateway_relayed_total",
            "requests of paths that are not ordered",
            [((("path", path),), n) for path, n in metrics.relayed.items()],
        ),
        (
            "kairos_gateway_uncounted_total",
            "prompts that the tokenizer or its chat template did not take",
            [((("model", model),), n) for model, n in metrics.uncounted.items()],
        ),
        (
            "kairos_gateway_reloads_total",
            "times that the configuration was read again, by result",
            [((("result", result),), n) for result, n in metrics.reloads.items()],
        ),
    ]
    for name, text, rows in counters:
        lines += (f"# HELP {name} {text}", f"# TYPE {name} counter")
        lines.extend(f"{name}{_labels(labels)} {n}" for labels, n in rows)
    for name, text, histogram in (
        ("kairos_gateway_ttft_seconds", "arrival to first token, of streams", metrics.ttft),
        ("kairos_gateway_tpot_seconds", "time per output token after the first, of streams", metrics.tpot),
        ("kairos_gateway_waited_seconds", "arrival to dispatch", metrics.waited),
    ):
        lines += (f"# HELP {name} {text}", f"# TYPE {name} histogram", *histogram.lines(name))
    seen: set[str] = set()
    for name, text, labels, value in gauges:
        if name not in seen:
            seen.add(name)
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += (f"# HELP {name} {text}", f"# TYPE {name} {kind}")
        lines.append(f"{name}{_labels(labels)} {value}")
    return "\n".join(lines) + "\n"


def instance_gauges(instances: Iterable[LiveInstance]) -> Iterator[tuple[str, str, Labels, float]]:
    """What is known of each instance, one metric after the other."""
    known = list(instances)
    for name, text, value in (
        ("kairos_gateway_instance_ready", "1: it gets requests", lambda i: i.state is State.READY),
        ("kairos_gateway_instance_requests", "requests of this gateway there", lambda i: i.requests),
        ("kairos_gateway_instance_connections", "open connections to it", lambda i: i.http.connections),
        (
            "kairos_gateway_instance_kv_usage_share",
            "of its KV cache, by its own word",
            lambda i: i.scraped.kv_usage_share,
        ),
        ("kairos_gateway_instance_running", "requests that run there, by its own word", lambda i: i.scraped.running),
        ("kairos_gateway_instance_waiting", "requests that wait there, by its own word", lambda i: i.scraped.waiting),
        ("kairos_gateway_instance_kv_expired_total", "KV that nobody took in time", lambda i: i.scraped.kv_expired),
    ):
        for instance in known:
            labels = (("instance", instance.instance_id), ("role", instance.role))
            yield name, text, labels, float(value(instance))


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
