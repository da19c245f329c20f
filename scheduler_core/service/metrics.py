"""Every Prometheus name of the control plane, once. A service has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import generate_latest

import kairos
from kairos.scheduler_core.decision import Reason
from kairos.scheduler_core.service.schedule import Decided
from kairos.scheduler_core.service.schemas import DecodeCode

_DECISION_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_RATIO = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0)


class Metrics:
    """What is counted; each part adds to its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("kairos_build", "Which Kairos this is.", registry=registry).info({"version": kairos.__version__})
        self.slo_requests = Counter(
            "kairos_slo_requests",
            "Requests that ended and had such a promise: ttft, tpot, or any (end_to_end).",
            ["slo_class", "tenant", "promise"],
            registry=registry,
        )
        self.slo_requests_met = Counter(
            "kairos_slo_requests_met",
            "Those for which it was kept; end_to_end: all that they had.",
            ["slo_class", "tenant", "promise"],
            registry=registry,
        )
        self.prediction_ratio = Histogram(
            "kairos_prediction_ratio",
            "Actual over predicted time, of requests that ended.",
            ["profile", "model_version", "time"],
            buckets=_RATIO,
            registry=registry,
        )
        self.decision_s = Histogram(
            "kairos_decision_seconds",
            "Time of one POST /schedule, without reading and writing.",
            buckets=_DECISION_S,
            registry=registry,
        )
        self.guarded = Counter(
            "kairos_guard_activations",
            "Decisions that a guard made in place of the policy.",
            ["guard"],
            registry=registry,
        )
        self._guarded = {name: self.guarded.labels(name) for name in (Reason.SHARE_GUARD, Reason.FALLBACK)}
        self.queue = Gauge("kairos_waiting_requests", "Requests waiting in the latest snapshot.", registry=registry)
        self.decisions = Counter(
            "kairos_decisions_recorded",
            "Decisions about requests that were recorded, by why.",
            ["kept_for"],
            registry=registry,
        )
        self.decisions_dropped = Counter(
            "kairos_decisions_dropped",
            "Decisions that were to be recorded and were not: queue full, database away.",
            registry=registry,
        )
        self.reservations = Gauge("kairos_reservations", "Reservations that count as load now.", registry=registry)
        self.reservations_ended = Counter(
            "kairos_reservations_ended", "Reservations that ended, by how.", ["how"], registry=registry
        )
        self.database_up = Gauge("kairos_database_up", "Whether the database answers.", registry=registry)
        self.reloads = Counter(
            "kairos_reloads", "Configurations read while running, by outcome.", ["outcome"], registry=registry
        )
        self.spans = Counter("kairos_spans", "Spans of traces, by what became of them.", ["outcome"], registry=registry)
        self.refused = Counter(
            "kairos_refused_requests",
            "Requests without a key that may make them, by what they were answered (401, 403).",
            ["status"],
            registry=registry,
        )
        self.telemetry_rows = Counter(
            "kairos_telemetry_rows",
            "Rows of telemetry, by kind and what became of them.",
            ["kind", "outcome"],
            registry=registry,
        )
        self.telemetry_queue = Gauge(
            "kairos_telemetry_queue_rows", "Rows of telemetry that wait to be stored.", registry=registry
        )
        self.expired_rows = Counter(
            "kairos_expired_rows", "Rows that were older than they are to be kept.", ["table"], registry=registry
        )
        self.expiry_failures = Counter(
            "kairos_expiry_failures", "Deletions of old rows that the database broke off.", registry=registry
        )
        self.trainings = Counter(
            "kairos_trainings", "Trainings that ended, by outcome.", ["outcome"], registry=registry
        )
        self.model_age_s = Gauge(
            "kairos_model_age_seconds",
            "Since the last good fit of the model that serves a profile.",
            ["profile"],
            registry=registry,
        )
        self.models_unreadable = Gauge(
            "kairos_unreadable_models",
            "Promoted models that cannot be read; the ones before them serve.",
            registry=registry,
        )
        self.drift_alarms = Counter(
            "kairos_drift_alarms", "Alarms of the drift test.", ["profile", "kind"], registry=registry
        )
        self.experiment_log_e = Gauge(
            "kairos_experiment_log_e", "Evidence of the running experiment.", ["side"], registry=registry
        )

        self.replays_failed = Counter(
            "kairos_failed_replays",
            "Replays of an experiment without an answer.",
            registry=registry,
        )
        self.shadow_left_out = Counter(
            "kairos_shadow_left_out_decisions", "Sampled decisions that the shadow did not look at.", registry=registry
        )

    def note_decision(self, decided: Decided) -> None:
        """Count what one answer says."""
        self.decision_s.observe(decided.decision_s)
        self.queue.set(len(decided.snapshot.waiting))
        for entry in decided.answer.prefill:
            if entry.reason.chosen_by in self._guarded:
                self._guarded[entry.reason.chosen_by].inc()
        for batch in decided.answer.decode:
            if batch.reason.code == DecodeCode.FALLBACK:
                self._guarded[Reason.FALLBACK].inc()

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
