"""The live part of `kairos demo`: service, workers and gateway as processes, and what is asked of them by REST."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx
import yaml

from kairos.adapters.cli import demo_torch
from kairos.adapters.cli.processes import free_ports, running, wait_for
from kairos.scheduler_core.domain import Part
from kairos.scheduler_core.errors import KairosError

if TYPE_CHECKING:
    from kairos.adapters.loadgen import LiveRun
    from kairos.adapters.simulator.tables import Workload
    from kairos.scheduler_core.domain import StepTimes
    from kairos.scheduler_core.slo import FloatArray
    from kairos.scheduler_core.telemetry import Steps

T = TypeVar("T")
Engine = Literal["emulated", "torch"]

_PATIENCE_S = 300.0
_LOOK_EVERY_S = 0.2
_DATABASE = "live.db"


class LiveFleet:
    """A running fleet and its control plane.

    Args:
        out: folder of its files.
        settings: the kairos.yaml of service and gateway.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.database = f"sqlite:///{out / _DATABASE}"
        self.learned = out / "learned.yaml"
        """The configuration with the model that was trained, for the simulator; there once it was."""
        self._settings = settings
        self.gateway_url = f"http://127.0.0.1:{settings['gateway']['port']}"
        self.service_url = str(settings["gateway"]["control_plane"]["url"])
        self._service = httpx.Client(base_url=self.service_url, timeout=30.0, trust_env=False)
        self._gateway = httpx.Client(base_url=self.gateway_url, timeout=30.0, trust_env=False)

    def close(self) -> None:
        """Let go of the connections."""
        self._service.close()
        self._gateway.close()

    # -- what is asked

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The service's answer to a POST."""
        return self._answer(self._service.post(path, json=body))

    def send(self, workload: "Workload", model: str, advance: Callable[[int], None]) -> "LiveRun":
        """Send requests to the gateway at their times; returns when the store has all that became of them."""
        import asyncio

        import uvloop

        from kairos.adapters.loadgen import Endpoint, send_all

        began_at_s = time.time()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            run = runner.run(send_all(workload, Endpoint(self.gateway_url, model), advance))
        self._wait("the store has every request", lambda: self._stored(began_at_s) >= len(workload))
        return run

    def train(self) -> str:
        """Have a model made of all steps that were logged, let it serve, wait until the gateway has it; its id."""
        number = self.post("/models/train", {})["id"]
        ended = self._wait("the training", lambda: self._ended(number))
        if ended["state"] != "done":
            raise KairosError(f"the training failed: {ended}")
        model: str = ended["models"][0]
        self.post(f"/models/{model}/promote", {"reason": "kairos demo: no two hours of steps for the gate to judge by"})
        name, version = model.rsplit("@", 1)
        content = self._service.get(f"/models/{name}/{version}/artifact").raise_for_status().content
        self._model_file().write_bytes(content)
        (profile,) = self._settings["profiles"]
        known = self._settings["profiles"][profile] | {"step_times": {"model": str(self._model_file())}}
        self.learned.write_text(
            "# Written by `kairos demo`: the live fleet, with the step times that were learned from it.\n"
            + yaml.safe_dump(dict(self._settings) | {"profiles": {profile: known}})
        )
        self._wait("the gateway has the model", lambda: f'version="{version}"' in self._gateway.get("/metrics").text)
        return model

    def switch(self, strategy: str) -> float:
        """Make a strategy the active one; the seconds until the gateway decides by it."""
        began_s = time.monotonic()
        self._answer(self._service.put("/strategies/active", json={"name": strategy}))
        self._wait(f"the gateway decides by {strategy}", lambda: self._decides_by(strategy))
        return time.monotonic() - began_s

    # -- what the store has

    def attained(self, since_s: float) -> dict[str, dict[str, float]]:
        """By strategy (`name@version`) of requests since then: how many, and the shares that met their targets."""
        import numpy as np

        from kairos.adapters.cli.db import opened
        from kairos.scheduler_core import slo
        from kairos.scheduler_core.service.store.queries.experiments import read_outcomes
        from kairos.scheduler_core.telemetry import REQUEST_STATUSES

        with opened(None, self.database) as store:
            rows = read_outcomes(store, since_s, time.time() + 1.0)
        finished = rows.status == REQUEST_STATUSES.index("finished")
        ttft_met = finished & slo.ttft_met(rows.ttft_s, rows.ttft_target_s)
        tpot_met = slo.tpot_met(rows.tpot_s, rows.tpot_target_s, rows.output_tokens.astype(np.float64), finished)
        found = {}
        for strategy in dict.fromkeys(rows.strategy):
            mine = rows.strategy == strategy
            found[str(strategy)] = {
                "requests": int(mine.sum()),
                "ttft_attainment": float(ttft_met[mine].mean()),
                "tpot_attainment": float(tpot_met[mine].mean()),
                "slo_attainment": float((ttft_met & tpot_met)[mine].mean()),
            }
        return found

    def steps(self, after: int = 0) -> tuple[list["Steps"], int]:
        """The steps that workers logged after one, by kind, and the number of the last."""
        from kairos.adapters.cli.db import opened
        from kairos.scheduler_core.service.store.queries.telemetry import read_steps

        with opened(None, self.database) as store:
            return read_steps(store, after)

    def prediction_errors(self, after: int) -> dict[str, dict[str, float]]:
        """By kind of step, of those logged after one: the median errors of the model and of the prior without any."""
        import numpy as np

        from kairos.predictors.artifact import load
        from kairos.predictors.roofline import roofline

        learned = load(self._model_file())
        found: dict[str, dict[str, float]] = {}
        for steps in self.steps(after)[0]:
            row: dict[str, float] = {"steps": len(steps)}
            by: dict[str, StepTimes] = {
                "learned": learned.profile(steps.profile),
                "prior": roofline(steps.profile),
            }
            for who, times in by.items():
                row[who] = float(np.median(np.abs(_predicted(steps, times) / steps.step_s - 1.0)))
            found[steps.kind] = row
        return found

    # -- parts

    def _model_file(self) -> Path:
        return self.learned.with_suffix(".kairos")

    def _stored(self, since_s: float) -> int:
        from kairos.adapters.cli.db import opened
        from kairos.scheduler_core.service.store.queries.experiments import read_outcomes

        with opened(None, self.database) as store:
            return len(read_outcomes(store, since_s, time.time() + 1.0).arrival_s)

    def _ended(self, number: int) -> dict[str, Any] | None:
        training: dict[str, Any] = self._answer(self._service.get(f"/models/trainings/{number}"))
        return training if training["ended_at"] else None

    def _decides_by(self, strategy: str) -> bool:
        return str(self._gateway.get("/health").json()["strategy"]).partition("@")[0] == strategy

    def ready(self) -> bool:
        """Whether the gateway has found every worker well and decides by what the service says."""
        health = self._gateway.get("/health").json()
        return "@" in health["strategy"] and all(i["state"] == "ready" for i in health["instances"].values())

    def wait_until_ready(self) -> None:
        """Wait for that."""
        self._wait("workers and gateway", self.ready)

    def _wait(self, what: str, look: Callable[[], T | None]) -> T:
        """What a look finds, as soon as it finds something."""
        until_s = time.monotonic() + _PATIENCE_S
        while not (found := look()):
            if time.monotonic() > until_s:
                raise KairosError(
                    f"{what}: did not come within {_PATIENCE_S:.0f} s; see the logs beside {self.database}"
                )
            time.sleep(_LOOK_EVERY_S)
        return found

    def _answer(self, response: httpx.Response) -> Any:
        if not response.is_success:
            raise KairosError(f"{response.request.url} answered {response.status_code}: {response.text[:300]}")
        return response.json()


def _predicted(steps: "Steps", times: "StepTimes") -> "FloatArray":
    """Predicted seconds of each step, which is of one prompt or of decodes alone."""
    import numpy as np

    if steps.kind == "prefill":
        sizes = zip(steps.new_tokens.astype(int).tolist(), steps.cached_tokens.astype(int).tolist(), strict=True)
        return np.array([times.prefill_step_s([Part(new, context)]) for new, context in sizes])
    batches = zip(steps.batch_size.astype(int).tolist(), steps.sum_context_tokens.astype(int).tolist(), strict=True)
    return np.array([times.decode_step_s(batch, context) for batch, context in batches])


@contextmanager
def live_fleet(
    out: Path, hardware: Mapping[str, Any], profile: str, active: str, engine: Engine
) -> Iterator[LiveFleet]:
    """Service, workers and gateway, on free ports of the loopback; all of them end with the block.

    Args:
        out: folder for configurations, logs and database.
        hardware: profiles, fleet (one group a role) and slo: what the workers are.
        profile: whose step times service and gateway are not told, and have to learn.
        active: the strategy to begin with.
        engine: what the workers are.
    """
    for path in out.glob(f"{_DATABASE}*"):
        path.unlink()
    settings, workers = _configurations(hardware, profile, active, out)
    told, known = out / "live.yaml", out / "workers.yaml"
    told.write_text("# Written by `kairos demo`: the service and the gateway.\n" + yaml.safe_dump(settings))
    known.write_text("# Written by `kairos demo`: the workers.\n" + yaml.safe_dump(workers))
    fleet = LiveFleet(out, settings)
    logs = {name: out / f"{name}.log" for name in ("serve", "gateway")}
    port = settings["service"]["port"]
    try:
        with ExitStack() as processes:
            service = processes.enter_context(running(logs["serve"], "serve", "--config", told, "--port", port))
            wait_for(f"{fleet.service_url}/healthz", service)
            started = [
                processes.enter_context(running(out / f"{name}.log", "worker", *command))
                for name, command in _workers(engine, known, workers, fleet.service_url).items()
            ]
            gateway = processes.enter_context(running(logs["gateway"], "gateway", "--config", told))
            wait_for(f"{fleet.gateway_url}/health", service, *started, gateway)
            fleet.wait_until_ready()
            yield fleet
    finally:
        fleet.close()


def _workers(
    engine: Engine, config: Path, workers: Mapping[str, Any], service_url: str
) -> dict[str, tuple[object, ...]]:
    """What `kairos worker` is told, by the name of its log."""
    if engine == "emulated":
        return {"worker": ("emulate", "--config", config, "--whole-fleet", "--control-plane", service_url)}
    commands: dict[str, tuple[object, ...]] = {}
    for role in ("prefill", "decode"):
        for number, group in enumerate(workers["fleet"][role]):
            size = ("--chunk-tokens", demo_torch.CHUNK_TOKENS, "--slots", demo_torch.SLOTS)
            place = ("--role", role, "--port", urlsplit(group["url"]).port, "--slot-tokens", demo_torch.SLOT_TOKENS)
            told = ("--model", demo_torch.MODEL, "--control-plane", service_url)
            commands[f"worker-{role}-{number}"] = ("torch", *told, *place, *size)
    return commands


def _configurations(
    hardware: Mapping[str, Any], profile: str, active: str, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What service and gateway are told, and what the workers know."""
    counts = {role: sum(group.get("count", 1) for group in hardware["fleet"][role]) for role in ("prefill", "decode")}
    service, gateway, *ports = free_ports(2 + sum(counts.values()))
    fleet = dict(hardware["fleet"])
    for role, count in counts.items():
        group = {name: value for name, value in fleet[role][0].items() if name != "count"}
        urls = [f"http://127.0.0.1:{ports.pop()}" for _ in range(count)]
        fleet[role] = [group | {"url": url, "engine": "vllm", "control": "gateway"} for url in urls]
    fleet["handover"] = {"first_token": "decode", "place_decode": "at_first_token"}
    workers = dict(hardware) | {"fleet": fleet}
    untold = {name: value for name, value in hardware["profiles"][profile].items() if name != "step_times"}
    settings = workers | {
        "profiles": {profile: untold},
        "active": active,
        "store": {"url": f"sqlite:///{out / _DATABASE}"},
        "service": {"port": service},
        "gateway": {"port": gateway, "control_plane": {"url": f"http://127.0.0.1:{service}"}},
    }
    return settings, workers
