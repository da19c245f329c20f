"""What the control plane tells data planes, made for tests."""

import msgspec
from service.experiments.made_experiments import plan

from kairos.adapters.dataplane.arms import Active
from kairos.scheduler_core.experiment import Schedule, sign
from kairos.scheduler_core.service.experiments.design import Design, draw_schedule

KEY = b"a key of the fleet"
CHAMPION, CHALLENGER = "s1@4", "s2@1"
BLOCK_S = 300.0


def version(known_as: str) -> dict[str, object]:
    """A version of a strategy as the service tells it."""
    name, number = known_as.split("@")
    policies = {
        "prefill": {"name": "edf", "params": {"lost_last": True}},
        "prefill_placement": {"name": "late", "params": {}},
        "decode_placement": {"name": "least-requests", "params": {}},
        "decode": {"name": "slack", "params": {"h": 0.9}},
        "admission": {"name": "accept-all", "params": {}},
    }
    return {"name": name, "version": int(number), "policies": policies, "text": "of no use", "created_at": None}


def schedule_of(design: Design = "switchback", **changes: object) -> Schedule:
    """The first day of an experiment."""
    return draw_schedule(plan(design, **changes), generation=3, start_s=0.0, from_s=0.0)


def answer(
    schedule: Schedule | None = None,
    design: Design = "switchback",
    *,
    generation: int = 3,
    key: bytes = KEY,
    champion: str = CHAMPION,
) -> Active:
    """What `GET /strategies/active` says."""
    told: dict[str, object] = {**version(champion), "generation": generation, "now_s": 0.0, "clock_scale": 1.0}
    if schedule is not None:
        told["experiment"] = {
            "id": schedule.experiment_id,
            "design": design,
            "challenger": version(CHALLENGER),
            "lengths": {"block_s": BLOCK_S, "burn_s": 60.0, "tail_s": 8.0, "settle_s": 20.0},
            "schedule": sign(schedule, key).decode(),
            "key_id": "0",
        }
    return msgspec.json.decode(msgspec.json.encode(told), type=Active)
