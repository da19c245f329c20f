"""Telemetry made up for tests, as it is sent, and what it takes once it is stored."""

import re
from pathlib import Path
from typing import Any

from sqlalchemy import text

from kairos.scheduler_core.service.store.queries.telemetry import RequestBatch, StepBatch, add_batch
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.telemetry import RequestRow, StepRow


def decode_step(**fields: Any) -> dict[str, Any]:
    """A decode step of 4 requests."""
    step = {"gpu": "H100", "model": "acme/llama-8b", "tp": 2, "engine": "vllm", "run": "r1", "prev_phase": "decode"}
    return step | {"batch_size": 4, "sum_context_tokens": 4000, "latency_ms": 12.5} | fields


def prefill_step(**fields: Any) -> dict[str, Any]:
    """A prefill step of one prompt."""
    step = {"gpu": "H100", "model": "acme/llama-8b", "tp": 2, "engine": "vllm", "run": "r1"}
    return step | {"n_requests": 1, "new_tokens": 512, "cached_tokens": 64, "latency_ms": 30.0} | fields


def request(**fields: Any) -> dict[str, Any]:
    """A request that was predicted well."""
    load = {"prefix_hit_ratio": 0.25, "kv_cache_usage": 0.5, "requests_running": 3, "requests_waiting": 1}
    tokens = {"input_tokens": 480, "output_tokens": 20, "prefill_tokens_in_flight": 512, "decode_tokens_in_flight": 90}
    times = {"ttft_ms": 64.5, "tpot_ms": 11.0, "predicted_ttft_ms": 60.0, "predicted_tpot_ms": 10.0}
    return load | tokens | times | {"request_id": "r-1", "tenant": "acme", "slo_class": "default"} | fields


def sample(**fields: Any) -> dict[str, Any]:
    """What a decode instance said of itself, two seconds after the sample before."""
    now = {"instance": "decode-0", "engine": "vllm", "at_s": 1.7e9, "requests_running": 3, "kv_cache_usage": 0.5}
    return now | {"interval_s": 2.0, "itl_ms": 12.5, "output_tokens": 480, "preemptions": 1} | fields


def step_row(**fields: Any) -> StepRow:
    """A decode step for the store."""
    return StepRow(**decode_step(**fields))


def request_row(**fields: Any) -> RequestRow:
    """A request for the store."""
    return RequestRow(**request(**fields))


def add(store: Store, *batches: StepBatch | RequestBatch) -> None:
    """Store batches, each in a transaction."""
    for batch in batches:
        with store.write() as connection:
            add_batch(connection, batch)


def used_bytes(store: Store) -> int:
    """What the database takes on disk, its log left out."""
    with store.read() as connection:
        if store.embedded:
            pages = text("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()")
            return int(connection.execute(pages).scalar_one())
        sizes = text("SELECT sum(pg_total_relation_size(name)) FROM unnest(ARRAY['steps', 'requests']) AS name")
        return int(connection.execute(sizes).scalar_one())


def documented(database: str, rows: str) -> int:
    """Bytes a row, as docs/store.md says."""
    found = re.search(
        rf"\| {rows}[^|]* \| (\d+) \| (\d+) \|", (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    )
    assert found is not None
    return int(found[1 if database == "sqlite" else 2])


def made_steps(n: int) -> list[StepRow]:
    """Decode steps."""
    return [step_row(batch_size=1 + k % 64, sum_context_tokens=(1 + k % 64) * (200 + k % 3000)) for k in range(n)]


def made_requests(n: int) -> list[RequestRow]:
    """Requests as a gateway sends them, with all that is known of them."""
    targets = {"ttft_target_ms": 2000.0, "tpot_target_ms": 50.0, "wait_ms": 12.5}
    by = {"strategy": "kairos@3", "prefill_instance": "prefill-0", "decode_instance": "decode-1"}
    return [
        request_row(
            request_id=f"req-{k:016x}",
            tenant=f"tenant-{k % 9}",
            input_tokens=k % 9000,
            arrived_at_s=1.7e9 + k / 7,
            session=f"{k:032x}",
            model_version="h100_acme-llama-8b_bf16_1_1_vllm@3",
            **targets,
            **by,
        )
        for k in range(n)
    ]
