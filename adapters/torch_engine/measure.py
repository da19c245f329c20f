"""Step times of a model on its device: prefill by new tokens and context, decode by batch and context."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch

from kairos.adapters.torch_engine.model import Chunk, Model
from kairos.scheduler_core.telemetry import StepRecord


class Point(NamedTuple):
    """A step to measure: so many sequences, each with so many new tokens behind so much context."""

    decodes: bool
    sequences: int
    new_tokens: int
    context_tokens: int


def points(model: Model, new_tokens: Sequence[int], batches: Sequence[int], contexts: Sequence[int]) -> list[Point]:
    """Every combination that fits the model's slots: prompts alone, and batches in decode."""
    prefill = [Point(False, 1, n, c) for n in new_tokens for c in contexts]
    decode = [Point(True, b, 1, c) for b in batches for c in contexts if c]
    cache = model.cache
    return [
        point
        for point in (*prefill, *decode)
        if point.sequences <= cache.slots and point.context_tokens + point.new_tokens <= cache.slot_tokens
    ]


def measured(
    model: Model,
    wanted: Sequence[Point],
    repeats: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[StepRecord]:
    """A record a step: the median over `repeats` rounds through all of them, after one that warms up.

    In rounds, so that a machine that slows down for a while does so for one measurement of each.

    Args:
        progress: told how many rounds are done.
    """
    model.cache.fill()
    rounds = []
    for done in range(1 + repeats):
        rounds.append([_seconds(model, point) for point in wanted])
        progress(done + 1)
    return [_record(point, median(seconds)) for point, *seconds in zip(wanted, *rounds[1:], strict=True)]


def _record(point: Point, seconds: float) -> StepRecord:
    decodes, sequences, new_tokens, context_tokens = point
    if decodes:
        return StepRecord("decode", seconds, batch_size=sequences, sum_context_tokens=sequences * context_tokens)
    return StepRecord(
        "prefill",
        seconds,
        n_requests=sequences,
        new_tokens=sequences * new_tokens,
        cached_tokens=sequences * context_tokens,
    )


def _seconds(model: Model, point: Point) -> float:
    """One step; whatever the slots hold counts as its context."""
    ids = [token % model.shape.vocab for token in range(point.new_tokens)]
    chunks = [Chunk(slot, point.context_tokens, ids) for slot in range(point.sequences)]
    if model.device.type != "cuda":
        started_s = time.perf_counter()
        model.step(chunks)
        return time.perf_counter() - started_s
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    model.step(chunks)
    ended.record()
    ended.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds / 1e3
