"""One request of an emulated engine, from its sequences to its answer."""

import asyncio
import time
from typing import TYPE_CHECKING, Any

from kairos.adapters.asgi import Send
from kairos.adapters.emulator.answers import DONE, Answer, answer_json, error, event
from kairos.adapters.emulator.device import Job
from kairos.adapters.emulator.faults import Fault
from kairos.adapters.emulator.handshakes import Leg, nixl_params
from kairos.adapters.http_client import UpstreamError

if TYPE_CHECKING:
    from kairos.adapters.emulator.worker import EmulatedWorker

HANDSHAKE_S = 300.0
"""How long one leg waits for the other."""


class Generation:
    """One request from its sequences to its answer."""

    def __init__(
        self,
        worker: "EmulatedWorker",
        answer: Answer,
        jobs: list[Job],
        leg: Leg | None,
        body: dict[str, Any],
        fault: Fault | None,
        client: tuple[str, int],
    ) -> None:
        self._worker, self._answer, self._jobs, self._leg = worker, answer, jobs, leg
        self._fault, self._client = fault, client
        self._streams = bool(body.get("stream"))
        options = body.get("stream_options") or {}
        self._usage = bool(options.get("include_usage")) if isinstance(options, dict) else False
        self.held = False
        """The KV waits to be taken."""

    async def go(self, send: Send) -> None:
        """Compute, and answer as it goes."""
        try:
            await self._begin(send)
            if self._streams:
                await self._stream(send)
            else:
                await self._whole(send)
        except UpstreamError as problem:
            await self._fail(send, str(problem))

    async def _begin(self, send: Send) -> None:
        gpu, leg = self._worker.gpu, self._leg
        if leg is None:
            for job in self._jobs:
                gpu.compute(job)
            return
        job = self._jobs[0]
        if leg.produces:
            job.output_tokens, job.hands_over = 1, True
            held = self._worker.desk.expect(leg.key)
            if leg.needs_decode_first:
                async with asyncio.timeout(HANDSHAKE_S):
                    await held.asked.wait()
            gpu.compute(job)
            return
        if self._streams:  # an engine answers before the KV is there; what fails then is an event
            await self._head(send)
        await self._worker.fetch(leg, job)
        gpu.resume(job)

    async def _head(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _stream(self, send: Send) -> None:
        if self._leg is None or self._leg.produces:
            await self._head(send)
        for index in range(len(self._jobs)):
            if opening := self._answer.opening(index):
                await send({"type": "http.response.body", "body": opening, "more_body": True})
        if self._fault is Fault.SSE_ERROR:
            await self._fail(send, "failed on purpose")
            return
        await asyncio.gather(*(self._relay(index, job, send) for index, job in enumerate(self._jobs)))
        self._handed_over()
        last = self._answer.usage_event(self._jobs) if self._usage else b""
        await send({"type": "http.response.body", "body": last + DONE})

    async def _relay(self, index: int, job: Job, send: Send) -> None:
        said = 0
        while count := await job.next_tokens():
            body = self._answer.tokens(index, job, said + 1, count)
            said += count
            await send({"type": "http.response.body", "body": body, "more_body": True})
            if self._fault is Fault.CUT:
                self._worker.server.cut(self._client)

    async def _whole(self, send: Send) -> None:
        for job in self._jobs:
            while await job.next_tokens():
                pass
        if self._fault is Fault.CUT:
            self._worker.server.cut(self._client)
            return
        if self._fault is Fault.SSE_ERROR:
            await self._fail(send, "failed on purpose")
            return
        await answer_json(send, 200, self._answer.whole(self._jobs, self._handed_over()))

    def _handed_over(self) -> dict[str, Any] | None:
        """Hold the KV for the decode leg; what NIXL tells it."""
        leg, worker = self._leg, self._worker
        if leg is None or not leg.produces:
            return None
        self.held = True
        job = self._jobs[0]
        tokens = job.prompt_tokens
        worker.desk.hold(leg.key, tokens, time.monotonic(), worker.gpu.handed_over(job))
        if worker.connector != "nixl":
            return None
        expires_at_s = time.time() + worker.options.lease_s
        return nixl_params(worker.engine_id, leg.key, worker.server.host, worker.server.port, tokens, expires_at_s)

    async def _fail(self, send: Send, message: str) -> None:
        if self._streams:
            await send({"type": "http.response.body", "body": event(error(500, message)) + DONE})
        else:
            await answer_json(send, 500, error(500, message))
