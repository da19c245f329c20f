"""Step times of a running engine, by its OpenAI API: nothing of it is changed or read.

The TTFT of a prompt that runs alone is its prefill, less what a call costs that computes nothing. Streams that run
together share their decode steps, so the pace of their tokens is the step time at that batch and context.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from kairos.adapters.http_client import HttpPool, UpstreamError
from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.telemetry import StepRecord

STEADY_STEPS = 32
"""Decode steps that a measurement is the mean of."""
_LEAST_STEPS = 4
_WAIT_S = 600.0
_TOKENS = range(4, 256)
"""Prompts are drawn of these: every vocabulary has them, and no two share a prefix that a cache could hold."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to measure."""

    prompt_tokens: Sequence[int]
    batches: Sequence[int]
    contexts: Sequence[int]
    """Prompt tokens of the streams of a batch."""
    repeats: int = 5
    chunk_tokens: int | None = None
    """Of the engine: a longer prompt takes several steps, and what one of them takes is a difference of two prompts."""


class EngineProfile:
    """Measures one engine.

    Args:
        key: sent as a bearer token when given.

    Raises:
        InputError: the address is none.
    """

    def __init__(self, url: str, model: str, key: str = "", seed: int = 0) -> None:
        try:
            self._pool = HttpPool(url)
        except ValueError as problem:
            raise InputError(str(problem)) from None
        self._model = model
        self._headers = [(b"content-type", b"application/json")]
        if key:
            self._headers.append((b"authorization", b"Bearer " + key.encode()))
        self._chance = random.Random(seed)
        self._answered = 0
        self._progress: Callable[[int], None] = lambda answered: None

    async def measure(self, sweep: Sweep, progress: Callable[[int], None] = lambda done: None) -> list[StepRecord]:
        """A record a point of the sweep: the median of its repeats.

        Args:
            progress: told how many requests are answered.

        Raises:
            InputError: the engine does not answer, or not with tokens.
        """
        self._progress = progress
        try:
            await self._stream(16, 2)  # what is made at the first request is made now
            return [*await self._prefill(sweep), *await self._decode(sweep)]
        except UpstreamError as problem:
            raise InputError(f"the engine does not answer: {problem}") from None
        finally:
            self._pool.close()

    async def _prefill(self, sweep: Sweep) -> list[StepRecord]:
        chunk, longest = sweep.chunk_tokens, max(sweep.prompt_tokens, default=0)
        alone = sorted({n for n in sweep.prompt_tokens if chunk is None or n <= chunk})
        cut = range(chunk, longest + 1, chunk) if chunk is not None and longest > chunk else range(0)
        lengths = sorted({*alone, *cut})
        # in rounds: a machine that slows down for a while does so for one measurement of each
        rounds = [[await self._call_s(), *[await self._ttft_s(n) for n in lengths]] for _ in range(sweep.repeats)]
        call_s, *whole_s = (median(times) for times in zip(*rounds, strict=True))
        ttft_s = dict(zip(lengths, whole_s, strict=True))
        steps = [(ttft_s[n] - call_s, n, 0) for n in sorted({*alone, *cut[:1]})]
        steps += [(ttft_s[n] - ttft_s[n - cut.step], cut.step, n - cut.step) for n in cut[1:]]
        return [
            StepRecord("prefill", seconds, n_requests=1, new_tokens=new_tokens, cached_tokens=context)
            for seconds, new_tokens, context in steps
            if seconds > 0
        ]

    async def _decode(self, sweep: Sweep) -> list[StepRecord]:
        records = []
        for batch in sweep.batches:
            for context in sweep.contexts:
                found = [await self._together(batch, context, sweep.chunk_tokens) for _ in range(sweep.repeats)]
                steady = [each for each in found if each is not None]
                if steady:
                    step_s, sums = zip(*steady, strict=True)
                    total = round(median(sums))
                    records.append(StepRecord("decode", median(step_s), batch_size=batch, sum_context_tokens=total))
        return records

    async def _together(self, batch: int, context: int, chunk: int | None) -> tuple[float, float] | None:
        """Step time and summed context while streams all run; None: they never did for long enough."""
        chunks = 1 if chunk is None else -(-context // chunk)
        output = STEADY_STEPS + batch * chunks  # those that begin first go on until the last has begun
        streams = await asyncio.gather(*(self._stream(context, output) for _ in range(batch)))
        begins_s, ends_s = max(came[0] for came in streams), min(came[-1] for came in streams)
        inside = [[at_s for at_s in came if begins_s <= at_s <= ends_s] for came in streams]
        if min(map(len, inside)) <= _LEAST_STEPS:
            return None
        step_s = median((came[-1] - came[0]) / (len(came) - 1) for came in inside)
        middle_s = (begins_s + ends_s) / 2
        return step_s, sum(context + sum(at_s <= middle_s for at_s in came) for came in streams)

    # -- single requests

    async def _call_s(self) -> float:
        """What a call takes that computes nothing."""
        started_s = time.perf_counter()
        answer = await self._pool.send(b"GET", b"/v1/models", self._headers)
        await answer.body()
        return time.perf_counter() - started_s

    async def _ttft_s(self, tokens: int) -> float:
        started_s = time.perf_counter()
        return (await self._stream(tokens, 1))[0] - started_s

    async def _stream(self, tokens: int, output_tokens: int) -> list[float]:
        """When the tokens of a completion came."""
        body = {
            "model": self._model,
            "prompt": self._chance.choices(_TOKENS, k=tokens),
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        raw = json.dumps(body).encode()
        wait = {"first_byte_s": _WAIT_S, "idle_s": _WAIT_S}  # an engine says 200 before it has computed anything
        answer = await self._pool.send(b"POST", b"/v1/completions", self._headers, raw, **wait)
        if answer.status != 200:
            told = (await answer.body()).decode(errors="replace")
            raise InputError(f"the engine answers {answer.status} to a prompt of {tokens} tokens: {told[:200]}")
        came: list[float] = []
        left = b""
        while piece := await answer.chunk():
            now_s = time.perf_counter()
            *lines, left = (left + piece).split(b"\n")
            for line in lines:
                came += [now_s] * _tokens_in(line)
        if not came:
            raise InputError(
                f"the engine streams no tokens for a prompt of {tokens}; is {self._model} a model for text?"
            )
        return came


def _tokens_in(line: bytes) -> int:
    """Tokens that an event brings: as many as it has ids, one where it has text and no ids.

    >>> _tokens_in(b'data: {"choices": [{"text": " a b", "token_ids": [5, 6]}]}')
    2
    """
    if not line.startswith(b"data: {"):
        return 0
    event = json.loads(line[6:])
    if "error" in event:
        raise InputError(f"the engine fails: {event['error']}")
    return sum(len(choice.get("token_ids") or ()) or bool(choice.get("text")) for choice in event.get("choices", ()))
