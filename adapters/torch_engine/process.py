"""A torch worker as a process: the HTTP side of an emulated worker in front of a real model."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

from kairos.adapters.embedded.settings import EngineSettings
from kairos.adapters.emulator.gpu import Limits
from kairos.adapters.emulator.worker import EmulatedWorker, Role, WorkerOptions
from kairos.adapters.telemetry_files import write_steps
from kairos.adapters.torch_engine.build import ModelOptions, build, profile_of
from kairos.adapters.torch_engine.engine import LEAST_PROMPT_TOKENS, TorchEngine
from kairos.adapters.torch_engine.text import text_of
from kairos.scheduler_core.errors import ConfigError, KairosError
from kairos.scheduler_core.telemetry import StepRecord


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """One torch worker."""

    model: ModelOptions
    role: Role
    settings: EngineSettings
    """What the plugins are told too: strategy, targets, step times, control plane."""
    chunk_tokens: int = 512
    """Most tokens of a step."""
    lease_s: float = 30.0
    name: str | None = None
    """What clients and telemetry call the model; None: the shape's name."""
    api_key: str = ""
    """For the control plane."""
    host: str = "127.0.0.1"
    port: int = 0


def torch_worker(
    options: TorchOptions, on_step: Callable[[StepRecord], None] | None = None
) -> tuple[EmulatedWorker, TorchEngine]:
    """A worker that is not started yet, and its engine; made inside its event loop.

    Raises:
        InputError: the model or a setting cannot be used.
    """
    of = options.model
    if options.chunk_tokens < of.slots + LEAST_PROMPT_TOKENS:
        raise ConfigError(
            f"{options.chunk_tokens} tokens a step are too few for {of.slots} sequences: give at least "
            f"{of.slots + LEAST_PROMPT_TOKENS}"
        )
    model = build(of)
    name = options.name or model.shape.name
    engine = TorchEngine(
        model,
        text_of(of.model, model.shape.vocab),
        options.settings.profile(profile_of(model, name)),
        options.settings,
        options.chunk_tokens,
        threads=of.threads,
        api_key=options.api_key,
        on_step=on_step,
    )
    told = WorkerOptions(
        engine="vllm",
        role=options.role,
        models=(name,),
        step_times=engine.policies.planner.step_times,
        limits=Limits(options.chunk_tokens, of.slots, of.slots, of.slots * of.slot_tokens),
        lease_s=options.lease_s,
        host=options.host,
        port=options.port,
    )
    return EmulatedWorker(told, engine), engine


def run_torch_worker(options: TorchOptions, telemetry: Path | None = None) -> None:
    """Run until SIGTERM or SIGINT. Says on stdout where it listens.

    Args:
        telemetry: a folder for its steps, written at its end.

    Raises:
        KairosError: it cannot start, or a step failed.
    """
    uvloop.run(_run(options, telemetry))


async def _run(options: TorchOptions, telemetry: Path | None) -> None:
    steps: list[StepRecord] = []
    worker, engine = torch_worker(options, steps.append if telemetry else None)
    ends = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ends.set)
    try:
        await worker.start()
    except OSError as problem:
        raise ConfigError(f"cannot listen on {options.host}:{options.port}: {problem.strerror or problem}") from None
    print(f"torch {options.role} worker on {worker.address}", flush=True)
    asked = asyncio.ensure_future(ends.wait())
    await asyncio.wait((asked, engine.task), return_when=asyncio.FIRST_COMPLETED)
    failed = engine.task.exception() if engine.task.done() else None
    await worker.stop(grace_s=1.0)
    if telemetry is not None:
        write_steps(telemetry, engine.policies.profile, steps)
    if failed is not None:
        raise KairosError(f"a step failed: {failed!r}") from failed
