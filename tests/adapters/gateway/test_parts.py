"""The parts of the gateway that can be tried alone: bodies, streams, tokens, prefixes, leases, metrics."""

import itertools
import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos.adapters.gateway.bodies import Body, Text
from kairos.adapters.gateway.calls import Call, Outcome
from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.health import KNOWN, scraped
from kairos.adapters.gateway.leases import KvGrant
from kairos.adapters.gateway.metrics import GatewayMetrics, exposition
from kairos.adapters.gateway.native import NativeBody
from kairos.adapters.gateway.prefixes import BLOCK_BYTES, PrefixIndex, block_ids
from kairos.adapters.gateway.stream import Relayed, usage_of
from kairos.adapters.gateway.tokens import TokenEstimates


def body_of(**fields: Any) -> Body:
    return Body(json.dumps({"model": "m"} | fields).encode())


# -- bodies


def test_the_prefill_leg_asks_for_one_token_and_nothing_that_needs_more() -> None:
    body = body_of(
        prompt="x",
        stream=True,
        max_tokens=50,
        max_completion_tokens=50,
        n=1,
        min_tokens=5,
        logprobs=3,
        stream_options={"include_usage": True},
        temperature=0.5,
    )

    leg = json.loads(body.prefill_leg({"kv_transfer_params": {"a": 1}}))

    assert leg == {
        "model": "m",
        "prompt": "x",
        "stream": False,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "n": 1,
        "temperature": 0.5,
        "kv_transfer_params": {"a": 1},
    }


def test_a_body_goes_on_as_it_came_but_for_what_is_between_kairos_and_its_engines() -> None:
    body = body_of(prompt="é", seed=12345678901234567890, kv_transfer_params={"a": 1}, priority=-9)

    assert json.loads(body.whole({})) == {"model": "m", "prompt": "é", "seed": 12345678901234567890}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "abcd"}, Text(4, 0)),
        ({"prompt": [1, 2, 3]}, Text(0, 3)),
        ({"prompt": ["ab", "cd"]}, Text(4, 0, sequences=2)),
        ({"prompt": [[1], [2, 3]], "n": 2}, Text(0, 3, sequences=4)),
        ({"prompt": "abcd", "n": 2, "best_of": 3}, Text(4, 0, sequences=3)),
    ],
)
def test_a_completion_is_measured_without_a_tokenizer(fields: dict[str, Any], text: Text) -> None:
    assert body_of(**fields).text(chat=False) == text


def test_images_in_a_chat_count_as_media_and_their_bytes_do_not() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:" + "A" * 10_000}}
    content = [{"type": "text", "text": "what is this?"}, image]

    text = body_of(messages=[{"role": "user", "content": content}]).text(chat=True)

    assert (text.text_bytes, text.media) == (13, 1)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_request_are_refused_with_400(raw: bytes) -> None:
    with pytest.raises(CallError) as refused:
        Body(raw).text(chat=False)

    assert refused.value.status == 400


# -- streams


def chunk(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0} | choice]}).encode() + b"\n\n"


ROLE = chunk(delta={"role": "assistant", "content": ""})
TOKENS = [chunk(delta={"content": f"t{k}"}) for k in range(5)]
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b": keep-alive\n\n" + ROLE + b"".join(TOKENS) + USAGE + DONE


@given(st.lists(st.integers(0, len(STREAM)), max_size=12), st.booleans())
def test_a_stream_is_read_the_same_however_it_is_cut(cuts: list[int], keep: bool) -> None:
    relayed = Relayed(keep_usage=keep)
    places = [0, *sorted(cuts), len(STREAM)]

    out = b"".join(relayed.feed(STREAM[a:b]) for a, b in itertools.pairwise(places))

    assert out == (STREAM if keep else STREAM.replace(USAGE, b""))
    assert (relayed.events, relayed.done) == (5, True)
    assert relayed.usage is not None
    assert relayed.usage.completion_tokens == 5


EVENTS = [
    *(
        ROLE,
        TOKENS[0],
        USAGE,
        DONE,
        b": keep-alive\n\n",
        b"data: {}\r\n\r\n",
        b'data: {"error": {"message": "no"}}\n\n',
    ),
    *(
        TOKENS[0] + TOKENS[1],
        TOKENS[0][:-1],
        b"\n",
        b"event: a\n" + TOKENS[0],
        b'data: {"a": {"error": 1}}\n\n',
        TOKENS[0][6:],
    ),
]


@given(st.lists(st.sampled_from(EVENTS), max_size=8))
def test_a_chunk_that_passes_as_it_is_framed_is_one_that_would_pass_anyway(contents: list[bytes]) -> None:
    fast, slow = Relayed(keep_usage=False), Relayed(keep_usage=False)
    for content in contents:
        try:
            out = slow.feed(content)
        except CallError:
            with pytest.raises(CallError):
                fast.feed(content)
            return
        framed = b"%x\r\n%b\r\n" % (len(content), content)
        taken = fast.passes(framed, len(b"%x\r\n" % len(content)))
        assert (content if taken else fast.feed(content)) == out
        assert (fast.events, fast.done, fast.usage) == (slow.events, slow.done, slow.usage)


def test_a_token_after_the_first_passes_as_it_is_framed() -> None:
    relayed = Relayed(keep_usage=False)
    framed = b"%x\r\n%b\r\n" % (len(TOKENS[1]), TOKENS[1])
    before = relayed.passes(framed, 4)
    relayed.feed(TOKENS[0])

    assert (before, relayed.passes(framed, 4), relayed.events) == (False, True, 2)


@pytest.mark.parametrize(
    ("event", "first"),
    [
        (ROLE, False),
        (b": keep-alive\n\n", False),
        (chunk(delta={"content": "a"}), True),
        (chunk(delta={"reasoning_content": "a"}), True),
        (chunk(delta={"tool_calls": [{"index": 0}]}), True),
        (chunk(text="a"), True),
        (chunk(text="", finish_reason="stop"), False),
    ],
)
def test_the_first_token_is_content_reasoning_or_a_tool_call(event: bytes, first: bool) -> None:
    relayed = Relayed(keep_usage=True)
    relayed.feed(event)

    assert relayed.events == first


@pytest.mark.parametrize("begun", [False, True])
def test_an_error_event_is_an_error_also_after_tokens(begun: bool) -> None:
    relayed = Relayed(keep_usage=True)
    if begun:
        relayed.feed(TOKENS[0])

    with pytest.raises(CallError):
        relayed.feed(b'data: {"error": {"message": "no", "code": 500}}\n\n' + DONE)


def test_text_that_looks_like_an_error_is_text() -> None:
    relayed = Relayed(keep_usage=True)
    event = chunk(delta={"content": 'data: {"error": {"usage":{}}} [DONE]'})

    assert relayed.feed(event) + relayed.feed(event) == event * 2
    assert not relayed.done


def test_usage_is_read_from_a_whole_answer() -> None:
    usage = usage_of(b'{"choices": [], "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}')

    assert usage is not None
    assert (usage.prompt_tokens, usage.cached_tokens) == (9, 4)


# -- tokens and prefixes


def test_the_bytes_a_token_has_are_learned_from_what_engines_count() -> None:
    estimates = TokenEstimates(media_tokens=100)
    for _ in range(200):
        estimates.learn("m", Text(3000, 0), 1000)

    assert estimates.bytes_per_token("m") == pytest.approx(3.0, rel=0.01)
    assert estimates.tokens("m", Text(600, 0, media=1)) == pytest.approx(300, abs=2)
    assert estimates.tokens("other", Text(400, 0)) == 100


def test_prompts_of_tokens_are_exact() -> None:
    assert TokenEstimates(100).tokens("m", Text(0, 123)) == 123


@given(st.binary(max_size=3000), st.binary(max_size=3000), st.binary(max_size=3000))
def test_prompts_share_block_ids_as_far_as_they_begin_alike(common: bytes, one: bytes, other: bytes) -> None:
    first, second = block_ids([common + one]), block_ids([common + other])
    same = len(common) // BLOCK_BYTES

    assert first[:same] == second[:same]
    differs = next((n for n, (a, b) in enumerate(zip(common + one, common + other, strict=False)) if a != b), None)
    if differs is not None:
        assert not set(first[differs // BLOCK_BYTES :]) & set(second[differs // BLOCK_BYTES :])


def test_a_prefix_counts_as_cached_once_it_was_sent_until_it_is_forgotten() -> None:
    index = PrefixIndex(kv_tokens=1000)
    blocks = block_ids([b"x" * 2560])
    before = index.hit_tokens(blocks, 2560, 640)
    index.use(blocks)
    after = index.hit_tokens(blocks, 2560, 640)
    index.use(block_ids([b"y" * 2560]))
    index.use(block_ids([b"z" * 2560]))

    assert (before, after) == (0, 639)
    assert index.hit_tokens(blocks, 2560, 640) < 639


def test_an_index_that_promises_too_much_is_believed_less() -> None:
    index = PrefixIndex(kv_tokens=1000)
    blocks = block_ids([b"x" * 2560])
    index.use(blocks)
    for _ in range(20):
        index.correct(expected_tokens=600, cached_tokens=0)

    assert index.hit_tokens(blocks, 2560, 640) < 20


# -- leases


def test_kv_is_handed_over_once() -> None:
    grant = KvGrant(msgspec.Raw(b"{}"), lease_s=30.0, now_s=0.0)
    grant.take(1.0)

    with pytest.raises(CallError) as refused:
        grant.take(2.0)

    assert refused.value.code == "kv_used"


def test_kv_is_not_handed_over_after_its_time() -> None:
    with pytest.raises(CallError) as refused:
        KvGrant(msgspec.Raw(b"{}"), lease_s=30.0, now_s=0.0).take(31.0)

    assert refused.value.code == "kv_expired"


def test_the_time_is_renewed_while_the_decode_engine_steps_and_never_once_it_was_over() -> None:
    grant = KvGrant(msgspec.Raw(b"{}"), lease_s=30.0, now_s=0.0)
    grant.renew(29.0)
    renewed = grant.expires_s
    grant.renew(60.0)

    assert (renewed, grant.expires_s) == (49.0, 49.0)


# -- engines and metrics


@pytest.mark.parametrize(
    ("engine", "version", "known"),
    [("vllm", "0.32.0+cpu", True), ("vllm", "0.11.0", False), ("vllm", "1.0.0", False), ("sglang", "0.5.23", True)],
)
def test_versions_are_known_or_not(engine: str, version: str, known: bool) -> None:
    assert bool(KNOWN[engine].match(version)) == known


def test_load_is_read_in_the_names_of_each_engine() -> None:
    vllm = scraped("vllm", {"vllm:num_requests_running": 3, "vllm:kv_cache_usage_perc": 0.5})
    sglang = scraped("sglang", {"sglang:num_queue_reqs": 4, "sglang:token_usage": 0.25})

    assert (vllm.running, vllm.kv_usage_share) == (3, 0.5)
    assert (sglang.waiting, sglang.kv_usage_share) == (4, 0.25)


def test_tenants_beyond_fifty_share_a_label() -> None:
    metrics = GatewayMetrics()
    body = body_of(prompt="x")
    for number in range(80):
        call = Call(number, "r", b"/v1/completions", False, body, body.text(False), 0.0)
        call.tenant = f"tenant-{number}"
        metrics.ended(call, Outcome.FINISHED, "")
    text = exposition(metrics, [])

    assert text.count("kairos_gateway_tenant_requests_total{") == 51
    assert 'tenant="other"} 30' in text


# -- bodies

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("model", "prompt", "messages", "stream", "stream_options", "n", "best_of", "text", "input_ids", "tools")
SAMPLING = ("sampling_params", "image_data")


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS + SAMPLING), anything), st.sampled_from(["completion", "chat", "native"]))
def test_any_body_is_understood_or_refused(told: dict[str, Any], kind: str) -> None:
    raw = json.dumps(told).encode()
    with suppress(CallError):
        body = NativeBody(raw, "m") if kind == "native" else Body(raw)
        assert body.text(kind == "chat").sequences >= 0
        assert isinstance(json.loads(body.whole({})), dict)
