"""What an emulated worker exposes of itself, in the names of the engine that it plays."""

from typing import TYPE_CHECKING, Any

from kairos.scheduler_core.domain import UNLIMITED_TOKENS

if TYPE_CHECKING:
    from kairos.adapters.emulator.worker import EmulatedWorker


def metrics_text(worker: "EmulatedWorker") -> str:
    """Prometheus text."""
    gpu, desk, model = worker.gpu, worker.desk, worker.options.models[0]
    labels = f'{{model_name="{model}",engine="0"}}'
    if worker.options.engine == "vllm":
        rows: list[tuple[str, float]] = [
            (f"vllm:num_requests_running{labels}", gpu.running),
            (f"vllm:num_requests_waiting{labels}", gpu.waiting),
            (f"vllm:kv_cache_usage_perc{labels}", usage_share(worker)),
            (f"vllm:generation_tokens_total{labels}", gpu.generated),
            (f"vllm:nixl_num_kv_expired_reqs_total{labels}", desk.expired),
        ]
    else:
        labels = f'{{model_name="{model}"}}'
        rows = [
            (f"sglang:num_running_reqs{labels}", gpu.running),
            (f"sglang:num_queue_reqs{labels}", gpu.waiting),
            (f"sglang:generation_tokens_total{labels}", gpu.generated),
            (f"sglang:token_usage{labels}", usage_share(worker)),
        ]
    rows += [
        ("kairos_emulator_requests_total", worker.requests),
        ("kairos_emulator_steps_total", gpu.steps),
        ("kairos_emulator_busy_seconds_total", gpu.busy_s),
        ("kairos_emulator_lagged_seconds_total", gpu.lagged_s),
        ("kairos_emulator_held_kv_requests", len(desk)),
        ("kairos_emulator_invalid_kv_reads_total", desk.invalid_reads),
    ]
    return "".join(f"{name} {value}\n" for name, value in rows)


def usage_share(worker: "EmulatedWorker") -> float:
    """Share of the KV cache in use; 0 without a limit."""
    capacity = worker.options.limits.kv_tokens
    return 0.0 if capacity >= UNLIMITED_TOKENS else worker.gpu.kv_used_tokens / capacity


def loads(worker: "EmulatedWorker") -> dict[str, Any]:
    """The body of SGLang's `/v1/loads`."""
    gpu = worker.gpu
    return {
        "loads": [
            {
                "dp_rank": 0,
                "num_running_reqs": gpu.running,
                "num_waiting_reqs": gpu.waiting,
                "num_used_tokens": gpu.kv_used_tokens,
                "max_total_num_tokens": worker.options.limits.kv_tokens,
                "token_usage": usage_share(worker),
            }
        ]
    }
