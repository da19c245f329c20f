"""What a vLLM step held, as telemetry and as Dynamo's message."""

from types import SimpleNamespace
from typing import Any

from kairos.adapters.embedded.mirror import Entry
from kairos.adapters.vllm.forward_pass import queued_of, scheduled_of
from kairos.adapters.vllm.report import StepShape, record_of, shape_of


def entry(name: str, prompt: int, computed: int, output: int = 0, remote: bool = False) -> Entry:
    """A request of which vLLM has counted `computed` tokens, those of the step included."""
    request = SimpleNamespace(num_computed_tokens=computed, num_tokens=prompt + output)
    return Entry(name, request, 0.0, prompt, (2.0, 0.05), "default", remote)


def shape(tokens: dict[str, int], *entries: Entry) -> StepShape:
    return shape_of({e.request_id: e for e in entries}, tokens, 1.0)


MIXED = (
    {"first": 512, "second": 100, "decoding": 1, "other": 1},
    entry("first", prompt=2000, computed=1024),
    entry("second", prompt=100, computed=100),
    entry("decoding", prompt=300, computed=309, output=9),
    entry("other", prompt=50, computed=51, output=1),
)


def test_a_mixed_step_has_its_prompts_and_its_decodes_with_their_context_before_it() -> None:
    found = record_of(shape(*MIXED), 0.25, "decode", "run")

    assert (found.kind, found.step_s, found.prev_phase) == ("mixed", 0.25, "decode")
    assert (found.n_requests, found.new_tokens, found.cached_tokens) == (2, 612, 512)
    assert (found.batch_size, found.sum_context_tokens) == (2, 308 + 50)


def test_a_step_names_the_prompts_that_it_completes() -> None:
    assert shape(*MIXED).done == ["second"]


def test_the_last_token_of_a_prompt_that_was_computed_elsewhere_is_a_decode() -> None:
    found = shape({"a": 1}, entry("a", prompt=400, computed=400, remote=True))

    assert [e.request_id for e in found.decodes] == ["a"]
    assert found.phase == "decode"


def test_the_last_token_of_a_prompt_computed_here_is_a_prompt_token() -> None:
    assert shape({"a": 1}, entry("a", prompt=400, computed=400)).phase == "context"


def test_what_a_preempted_request_computes_again_is_prompt_work() -> None:
    found = shape({"a": 300}, entry("a", prompt=200, computed=300, output=100))

    assert found.new_tokens == 300
    assert found.done == ["a"]


def test_dynamos_message_has_the_moments_of_the_step() -> None:
    found = scheduled_of(shape(*MIXED))

    assert (found.num_prefill_requests, found.sum_prefill_tokens, found.sum_prefill_kv_tokens) == (2, 612, 512)
    assert found.var_prefill_length == 950.0**2
    assert (found.num_decode_requests, found.sum_decode_kv_tokens) == (2, 358)
    assert found.var_decode_kv_tokens == 129.0**2


def test_dynamos_message_tells_preempted_requests_from_waiting_prompts() -> None:
    def waits(status: str, tokens: int, computed: int = 0) -> Any:
        return SimpleNamespace(status=SimpleNamespace(name=status), num_tokens=tokens, num_computed_tokens=computed)

    found = queued_of([waits("WAITING", 100), waits("WAITING", 300), waits("WAITING_FOR_REMOTE_KVS", 70, 69)])

    assert (found.num_prefill_requests, found.sum_prefill_tokens, found.var_prefill_length) == (2, 400, 10_000.0)
    assert (found.num_decode_requests, found.sum_decode_kv_tokens) == (1, 69)
