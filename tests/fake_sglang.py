"""As much of SGLang 0.5.23's scheduler as the hooks touch, in its own words; its sources are read in tests/engine."""

from collections.abc import MutableSequence
from types import SimpleNamespace
from typing import Any


class Req:
    """A request."""

    def __init__(self, rid: str, prompt: int, cached: int = 0, output: int = 0, **params: Any) -> None:
        self.rid = rid
        self.origin_input_ids = [0] * prompt
        self.output_ids = [0] * output
        self.num_matched_prefix_tokens = cached
        self.prefix_len = cached
        self.extend_len = prompt - cached
        self.sampling_params = SimpleNamespace(custom_params=params or None)
        self.is_done = False

    def finished(self) -> bool:
        return self.is_done


class SchedulePolicy:
    """Orders the waiting queue: first come, first served."""

    def calc_priority(
        self, waiting_queue: MutableSequence[Req], running_batch: Any = None, processed_tokens: int = 0
    ) -> None:
        pass

    def shortest_prefill_chunk_limit(
        self, chunked_req: Req, waiting_queue: MutableSequence[Req], budget: int, page_size: int
    ) -> int | None:
        return None


class Scheduler:
    """One rank."""

    def __init__(self, tp_size: int = 1, chunk: int = 512, slots: int = 8) -> None:
        self.tp_size, self.pp_size, self.page_size = tp_size, 1, 16
        self.chunked_prefill_size, self.max_running_requests = chunk, slots
        self.max_total_num_tokens = 100_000
        self.server_args = SimpleNamespace(served_model_name="small")
        self.waiting_queue: list[Req] = []
        self.policy: Any = None
        self.init_schedule_policy()

    def init_schedule_policy(self) -> None:
        self.policy = SchedulePolicy()

    def process_batch_result(self, batch: Any, result: Any) -> None:
        for req in batch.reqs:
            if batch.forward_mode.is_decode():
                req.output_ids.append(0)

    def _get_new_prebuilt_batch(self, running_batch: Any) -> list[Req] | None:
        free = self.max_running_requests - len(running_batch.reqs)
        taken, self.waiting_queue = self.waiting_queue[:free], self.waiting_queue[free:]
        return taken or None


def batch(*reqs: Req, decode: bool = True) -> Any:
    """A batch of these requests."""
    mode = SimpleNamespace(is_decode=lambda: decode, is_extend=lambda: not decode)
    return SimpleNamespace(reqs=list(reqs), forward_mode=mode)
