"""The bodies that an emulated engine answers with."""

import json
import time
from collections.abc import Sequence
from typing import Any

from kairos.adapters.asgi import Send, answer
from kairos.adapters.emulator.device import Job


class Answer:
    """Writes one answer, of a completion or a chat.

    Args:
        tells_ids: the ids of the tokens too, as vLLM does for `return_token_ids`.
    """

    def __init__(self, request_id: str, model: str, chat: bool, tells_ids: bool = False) -> None:
        self._chat, self._tells_ids = chat, tells_ids
        self.head: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def opening(self, index: int) -> bytes:
        """The event before the first token: a role in a chat, nothing otherwise."""
        return self._event(index, {"role": "assistant", "content": ""}, None) if self._chat else b""

    def tokens(self, index: int, job: Job, first: int, count: int) -> bytes:
        """The event of `count` tokens of a job from the `first`-th."""
        text = job.text(first, count)
        delta = {"content": text} if self._chat else text
        return self._event(index, delta, job.finish_reason if job.ended else None, self._ids(job, first, count))

    def _ids(self, job: Job, first: int, count: int) -> dict[str, Any]:
        return {"token_ids": list(job.token_ids(first, count))} if self._tells_ids else {}

    def _event(self, index: int, delta: object, finish_reason: str | None, more: dict[str, Any] | None = None) -> bytes:
        choice = {"index": index, "delta" if self._chat else "text": delta, "logprobs": None}
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        choice |= {"finish_reason": finish_reason} | (more or {})
        return event(self.head | {"object": kind, "choices": [choice]})

    def usage_event(self, jobs: Sequence[Job]) -> bytes:
        """The last event when usage is asked for."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return event(self.head | {"object": kind, "choices": [], "usage": usage(jobs)})

    def whole(self, jobs: Sequence[Job], kv_transfer_params: dict[str, Any] | None) -> Any:
        """The answer without streaming."""
        choices = []
        for index, job in enumerate(jobs):
            text = job.text(1, job.emitted)
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            said |= self._ids(job, 1, job.emitted)
            choices.append({"index": index, "logprobs": None, "finish_reason": job.finish_reason} | said)
        body = self.head | {
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": choices,
            "usage": usage(jobs),
        }
        return body if kv_transfer_params is None else body | {"kv_transfer_params": kv_transfer_params}


class NativeAnswer(Answer):
    """Writes one answer of SGLang's `/generate`: its events repeat the text so far."""

    def __init__(self, request_id: str, jobs: Sequence[Job]) -> None:
        self._request_id, self._jobs = request_id, jobs

    def opening(self, index: int) -> bytes:
        """Nothing comes before the first token."""
        return b""

    def tokens(self, index: int, job: Job, first: int, count: int) -> bytes:
        """The event of `count` tokens of a job from the `first`-th, after those before."""
        return event(self._told(index, first + count - 1, job.ended))

    def usage_event(self, jobs: Sequence[Job]) -> bytes:
        """Every event says it."""
        return b""

    def whole(self, jobs: Sequence[Job], kv_transfer_params: dict[str, Any] | None) -> Any:
        """The answer without streaming."""
        told = [self._told(index, job.emitted, True) for index, job in enumerate(jobs)]
        return told if len(told) > 1 else told[0]

    def _told(self, index: int, tokens: int, ends: bool) -> dict[str, Any]:
        job = self._jobs[index]
        meta = {
            "id": self._request_id,
            "finish_reason": {"type": "length", "length": tokens} if ends else None,
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": tokens,
            "cached_tokens": job.cached_tokens,
        }
        text, ids = job.text(1, tokens), list(job.token_ids(1, tokens))
        return {"text": text, "output_ids": ids, "index": index, "meta_info": meta}


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Tokens of an answer."""
    prompt, output = sum(job.prompt_tokens for job in jobs), sum(job.emitted for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in jobs)},
    }


async def answer_json(send: Send, status: int, body: Any) -> None:
    """Answer with JSON."""
    await answer(send, status, json.dumps(body).encode())


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def error(status: int, message: str) -> dict[str, Any]:
    """An error as vLLM and SGLang write it."""
    kind = "BadRequestError" if status == 400 else "NotFoundError" if status == 404 else "InternalServerError"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
