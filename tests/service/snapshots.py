"""A small service and snapshots for it: an instance computes 1,000 prompt tokens a second, as in builders.py."""

import asyncio
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.schemas import Snapshot

PROFILES = {
    "even": {
        "gpu": "H100",
        "model": "org/model-8b",
        "engine": "vllm",
        "step_times": {"linear": {"prefill": {"b_s": 1e-3}, "decode": {"a_s": 0.01, "b_s": 1e-3}}},
    }
}


def settings_of(**sections: Any) -> Settings:
    """Settings with the profile `even`, 2 prefill and 2 decode instances, and whatever is given."""
    document = {
        "profiles": PROFILES,
        "fleet": {"prefill": [{"count": 2, "profile": "even"}], "decode": [{"count": 2, "profile": "even"}]},
        "slo": {"classes": {"default": {"ttft_s": 10.0, "tpot_s": 0.05}, "batch": {"ttft_s": None, "tpot_s": None}}},
    }
    return Settings.model_validate(document | sections)


def scheduler_of(settings: Settings) -> Scheduler:
    """The scheduler without the service around it."""
    return Scheduler(settings, {name: s.as_strategy(name).check() for name, s in settings.strategies.items()})


def prefill(instance_id: str = "prefill-0", **fields: Any) -> dict[str, Any]:
    """A prefill instance."""
    return {"instance_id": instance_id, "role": "prefill", "profile": "even"} | fields


def decode(instance_id: str = "decode-0", **fields: Any) -> dict[str, Any]:
    """A decode instance."""
    return {"instance_id": instance_id, "role": "decode", "profile": "even"} | fields


def waits(request_id: str | int, prompt_tokens: int = 1_000, arrival_s: float = 0.0, **fields: Any) -> dict[str, Any]:
    """A waiting request."""
    return {"request_id": request_id, "arrival_s": arrival_s, "prompt_tokens": prompt_tokens} | fields


def snapshot(*instances: dict[str, Any], **lists: Any) -> dict[str, Any]:
    """A snapshot at second 0."""
    return {"now_s": 0.0, "instances": list(instances)} | lists


def call(app: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    """One request to an application, in process."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://kairos") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def refused(
    body: dict[str, Any] | bytes, settings: Settings | None = None, headers: dict[str, str] | None = None
) -> httpx.Response:
    """The answer to a body that cannot be used."""
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    app = create_app(settings or settings_of())
    return call(
        app, "POST", "/schedule", content=content, headers={"content-type": "application/json"} | (headers or {})
    )


def answered(body: dict[str, Any], settings: Settings | None = None, scheduler: Scheduler | None = None) -> Any:
    """The answer to a snapshot, as a caller reads it."""
    content = msgspec.json.encode(body)
    scheduler = scheduler or scheduler_of(settings or settings_of())
    decisions = scheduler.schedule(msgspec.json.decode(content, type=Snapshot), 0.0, content)
    return msgspec.json.decode(msgspec.json.encode(decisions))


def order_on(answer: Any, instance_id: str = "prefill-0") -> list[str | int]:
    """Ids of the waiting requests of an instance, the first to run first."""
    mine = [entry for entry in answer["prefill"] if entry["instance_id"] == instance_id]
    return [entry["request_id"] for entry in sorted(mine, key=lambda entry: entry["order"])]
