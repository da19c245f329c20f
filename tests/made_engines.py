"""Engines as far as telemetry goes: what they expose, over HTTP and over ZMQ."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import msgspec

VLLM_TEXT = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="acme/llama-8b"}} 3.0
vllm:num_requests_running{{engine="1",model_name="acme/llama-8b"}} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="acme/llama-8b"}} 7.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="acme/llama-8b"}} 0.25
vllm:kv_cache_usage_perc{{engine="1",model_name="acme/llama-8b"}} 0.75
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{engine="0",model_name="acme/llama-8b"}} {prompt}
vllm:prompt_tokens_created{{engine="0",model_name="acme/llama-8b"}} 1.7e+09
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="acme/llama-8b"}} {generated}
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{{engine="0",model_name="acme/llama-8b"}} {preempted}
# TYPE vllm:request_success_total counter
vllm:request_success_total{{engine="0",finished_reason="stop",model_name="acme/llama-8b"}} {finished}
vllm:request_success_total{{engine="0",finished_reason="length",model_name="acme/llama-8b"}} 1.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{{engine="0",model_name="acme/llama-8b"}} {prompt}
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{{engine="0",model_name="acme/llama-8b"}} {hits}
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1",model_name="acme/llama-8b"}} 1.0
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="acme/llama-8b"}} {finished}
vllm:time_to_first_token_seconds_count{{engine="0",model_name="acme/llama-8b"}} {finished}
vllm:time_to_first_token_seconds_sum{{engine="0",model_name="acme/llama-8b"}} {ttft}
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_count{{engine="0",model_name="acme/llama-8b"}} {generated}
vllm:inter_token_latency_seconds_sum{{engine="0",model_name="acme/llama-8b"}} {itl}
# TYPE vllm:nixl_num_kv_expired_reqs_total counter
vllm:nixl_num_kv_expired_reqs_total{{engine="0",model_name="acme/llama-8b"}} {expired}
"""

SGLANG_TEXT = """# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{{engine_type="unified",model_name="m",tp_rank="0"}} 4.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{{engine_type="unified",model_name="m",tp_rank="0"}} 2.0
# TYPE sglang:token_usage gauge
sglang:token_usage{{engine_type="unified",model_name="m",tp_rank="0"}} 0.5
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{{model_name="m"}} {prompt}
# TYPE sglang:cached_tokens_total counter
sglang:cached_tokens_total{{model_name="m"}} {cached}
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{{model_name="m"}} 90.0
# TYPE sglang:e2e_request_latency_seconds histogram
sglang:e2e_request_latency_seconds_sum{{model_name="m"}} {e2e}
sglang:e2e_request_latency_seconds_count{{model_name="m"}} {finished}
"""


def vllm_text(**figures: float) -> str:
    """vLLM's metrics, with all counters at 0 where nothing is said."""
    names = ("prompt", "generated", "preempted", "finished", "hits", "ttft", "itl", "expired")
    return VLLM_TEXT.format(**(dict.fromkeys(names, 0.0) | figures))


def sglang_text(**figures: float) -> str:
    """SGLang's metrics, likewise."""
    return SGLANG_TEXT.format(**(dict.fromkeys(("prompt", "cached", "e2e", "finished"), 0.0) | figures))


def loads_text(steps: int, batches: int, microseconds: int) -> bytes:
    """SGLang's `/v1/loads`."""
    ranks = [
        {"dp_rank": 0, "num_running_reqs": 6, "num_waiting_reqs": 1, "token_usage": 0.25, "gen_throughput": 9.5}
        | {"decode_moments": [steps, batches, microseconds, 0, 0, batches]},
        {"dp_rank": 1, "num_running_reqs": 2, "num_waiting_reqs": 0, "token_usage": 0.75},
    ]
    return msgspec.json.encode({"timestamp": "2026-05-01T00:00:00", "version": "0.5.23", "loads": ranks})


Pages = dict[str, str | bytes | Callable[[], str | bytes]]
"""By path; what is not there is answered 404."""


@contextmanager
def engine(pages: Pages) -> Iterator[str]:
    """An engine's HTTP server that answers with these pages, which may be changed; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page: Any = pages.get(self.path)
            content = page() if callable(page) else page
            body = content.encode() if isinstance(content, str) else content or b"not found"
            self.send_response(404 if page is None else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def hanging() -> Iterator[Callable[[], str]]:
    """A page that does not come until the test has ended."""
    ended = Event()

    def page() -> str:
        ended.wait(30)
        return ""

    try:
        yield page
    finally:
        ended.set()


def forward_pass(sequence: int, seconds: float, **scheduled: int) -> list[bytes]:
    """The frames of one message, as Dynamo's publisher sends them."""
    queued = {"num_prefill_requests": 1, "sum_prefill_tokens": 7, "var_prefill_length": 0.0}
    message = {"version": 1, "worker_id": "w", "dp_rank": 0, "counter_id": sequence, "wall_time": seconds}
    body = message | {"scheduled_requests": {"var_prefill_length": 0.0} | scheduled, "queued_requests": queued}
    return [b"", sequence.to_bytes(8, "big"), msgspec.msgpack.encode(body)]
