"""Forward-pass metrics become steps: every message of one publisher, in order, over a real socket."""

import time
import uuid
from pathlib import Path

import msgspec
import pytest
import zmq
from made_engines import forward_pass

from kairos.adapters.sources.forward_pass import StepReader, Subscriber
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.telemetry import StepRow

PROFILE = Profile("H100", "acme/llama-8b", "bf16", 2, 1, "vllm")
PREFILL = {"num_prefill_requests": 2, "sum_prefill_tokens": 512, "sum_prefill_kv_tokens": 64}
DECODE = {"num_decode_requests": 8, "sum_decode_kv_tokens": 9000}


def steps_of(*messages: list[bytes]) -> tuple[list[StepRow], dict[str, int]]:
    reader = StepReader(PROFILE, "live")
    return [step for frames in messages if (step := reader.step(frames)) is not None], dict(reader.counts)


def test_a_step_holds_what_the_message_says_under_the_profile_of_the_engine() -> None:
    (step,), counts = steps_of(forward_pass(0, 0.03, **PREFILL, **DECODE))

    assert (step.gpu, step.model, step.precision, step.tp, step.engine, step.run) == (
        *("H100", "acme/llama-8b", "bf16", 2, "vllm", "live"),
    )
    assert (step.latency_ms, step.n_requests, step.new_tokens, step.cached_tokens) == (30.0, 2, 512, 64)
    assert (step.batch_size, step.sum_context_tokens, step.step_kind) == (8, 9000, "mixed")
    assert counts == {}


def test_what_ran_before_is_told_unless_a_message_is_missing() -> None:
    messages = [
        forward_pass(5, 0.01, **DECODE),
        forward_pass(6, 0.02, **PREFILL),
        forward_pass(7, 0.02, **PREFILL, **DECODE),
        forward_pass(8, 0.01, **DECODE),
        forward_pass(9, 0.0),
        forward_pass(10, 0.01, **DECODE),
        forward_pass(14, 0.01, **DECODE),
        forward_pass(0, 0.01, **DECODE),  # the publisher began anew
    ]
    steps, counts = steps_of(*messages)

    assert [step.prev_phase for step in steps] == ["", "decode", "context", "mixed", "idle", "", ""]
    assert counts == {"missed": 3}


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"", b"\0" * 8],
        [b"", b"\0" * 7, b""],
        [b"", b"\0" * 8, b"\xc1"],
        [b"", b"\0" * 8, msgspec.msgpack.encode({"wall_time": "long"})],
        [b"", b"\0" * 8, msgspec.msgpack.encode({"version": 2, "wall_time": 0.1})],
        forward_pass(0, 0.1, num_prefill_requests=1),
        forward_pass(0, float("nan"), **DECODE),
        forward_pass(0, 0.1, num_decode_requests=-4),
    ],
)
def test_a_message_that_cannot_be_is_counted_and_the_next_one_read(frames: list[bytes]) -> None:
    steps, counts = steps_of(frames, forward_pass(1, 0.01, **DECODE))

    assert (len(steps), counts) == (1, {"unreadable": 1})


def test_a_subscriber_hears_what_is_published(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/{uuid.uuid4().hex[:8]}"
    publisher = zmq.Context.instance().socket(zmq.XPUB)  # like PUB, and it hears who subscribes
    subscriber = Subscriber(address, PROFILE, "live")  # before there is anybody to hear
    publisher.bind(address)
    assert publisher.recv() == b"\x01"
    for number in range(200):
        publisher.send_multipart(forward_pass(number, 0.01 + number / 1e4, **DECODE))
    heard: list[StepRow] = []
    until_s = time.monotonic() + 20
    while len(heard) < 200 and time.monotonic() < until_s:
        heard += subscriber.steps()
    subscriber.close()
    publisher.close(0)

    assert [step.latency_ms for step in heard] == pytest.approx([10.0 + number / 10 for number in range(200)])
    assert subscriber.counts == {}


def test_an_address_that_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match=r"forward_pass 'tcp://nowhere'.*give tcp://HOST:PORT"):
        Subscriber("tcp://nowhere", PROFILE, "live")
