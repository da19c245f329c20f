"""What engines say of their KV caches is known in the gateway, also after messages were lost."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from emulated import MODEL, call, options, run, until, workers
from gateways import fleet_of, running_gateway, settings_for
from hypothesis import given
from hypothesis import strategies as st

from kairos.adapters.emulator.gpu import Limits
from kairos.adapters.emulator.kv_events import KvEventPublisher
from kairos.adapters.emulator.prompts import Prompt, prompts_of
from kairos.adapters.emulator.worker import EmulatedWorker
from kairos.adapters.gateway.kv_events import KvEventReader, StoredBlocks, token_blocks
from kairos.scheduler_core.errors import ConfigError

TOKENS = list(range(100, 148))
"""Three blocks of 16."""


def stored(first: int = 0, end: int = 3, **changes: Any) -> dict[str, Any]:
    """The event that blocks of TOKENS were stored, under the hashes 0, 1, 2."""
    told = {"type": "BlockStored", "block_hashes": list(range(first, end)), "block_size": 16, "lora_id": None}
    told |= {"parent_block_hash": first - 1 if first else None, "token_ids": TOKENS[first * 16 : end * 16]}
    return told | changes


def removed(*hashes: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"}


def after(*events: object) -> StoredBlocks:
    blocks = StoredBlocks()
    blocks.apply(events)
    return blocks


def hits(blocks: StoredBlocks, tokens: list[int] = TOKENS, adapter: str = "") -> int:
    return blocks.hit_tokens(token_blocks(tokens, 16, adapter))


def test_blocks_are_known_by_their_tokens_from_the_first_on() -> None:
    assert hits(after(stored())) == 48
    assert hits(after(stored()), [*TOKENS, 1, 2]) == 48
    assert hits(after(stored()), [*TOKENS[:20], 1]) == 16
    assert hits(after(stored(0, 1), stored(1, 3))) == 48
    assert hits(after(stored(1, 3))) == 0, "their first block is not known"


def test_what_was_removed_or_cleared_is_no_hit() -> None:
    assert hits(after(stored(), removed(1))) == 16
    assert hits(after(stored(), removed(7))) == 48
    assert hits(after(stored(), {"type": "AllBlocksCleared"})) == 0


def test_both_forms_of_events_are_read_and_hashes_of_bytes_too() -> None:
    old = ["BlockStored", [b"a", b"b"], None, TOKENS[:32], 16, None]
    blocks = after(old)

    assert hits(blocks) == 32
    blocks.apply([["BlockRemoved", [b"b"]]])
    assert hits(blocks) == 16
    blocks.apply([["AllBlocksCleared"]])
    assert hits(blocks) == 0


def test_other_media_other_layers_and_blocks_of_more_than_tokens_do_not_count() -> None:
    assert hits(after(stored(medium="CPU"))) == 0
    assert hits(after(stored(group_idx=1))) == 0
    assert hits(after(stored(extra_keys=[None, ["image"], None]))) == 16
    assert hits(after(stored(lora_name="mine"))) == 0
    assert hits(after(stored(lora_name="mine", extra_keys=[["mine"]] * 3)), adapter="mine") == 48


@given(st.lists(st.tuples(st.sampled_from(["store", "remove"]), st.integers(0, 2))))
def test_hits_are_the_leading_blocks_that_are_there(story: list[tuple[str, int]]) -> None:
    blocks, there = StoredBlocks(), set[int]()
    for what, place in story:
        if what == "store" and (place == 0 or place - 1 in there):
            there.add(place)
            blocks.apply([stored(place, place + 1)])
        elif what == "remove":
            there.discard(place)
            blocks.apply([removed(place)])

    leading = next((place for place in range(3) if place not in there), 3)
    assert hits(blocks) == leading * 16


# -- over the wire


def prompt_of(tokens: list[int]) -> Prompt:
    return prompts_of({"prompt": tokens}, chat=False)[0]


@contextmanager
def heard(publisher: KvEventPublisher, replays: bool = True) -> Iterator[KvEventReader]:
    """A reader that has heard a first batch."""
    replay = f"tcp://127.0.0.1:{publisher.replay_port}" if replays else ""
    reader = KvEventReader(f"tcp://127.0.0.1:{publisher.port}", replay)
    reader.start()
    try:
        yield reader
    finally:
        reader.close()


@contextmanager
def publishing(port: int = 0, replay_port: int = 0) -> Iterator[KvEventPublisher]:
    while True:
        try:
            publisher = KvEventPublisher("127.0.0.1", port, replay_port)
            break
        except ConfigError:  # ZeroMQ lets go of ports a little after a socket was closed
            time.sleep(0.01)
    try:
        yield publisher
    finally:
        publisher.close()


def say_until_heard(publisher: KvEventPublisher, reader: KvEventReader) -> None:
    """A subscriber hears nothing of what is sent while it connects."""

    async def work() -> None:
        while not reader.counts["heard"]:
            publisher.publish([])
            await asyncio.sleep(0.01)

    run(work())


def knows(reader: KvEventReader, tokens: int) -> None:
    run(until(lambda: hits(reader.stored) == tokens))


def test_what_was_published_before_is_asked_for_at_the_start() -> None:
    with publishing() as publisher:
        publisher.publish([publisher.stored(prompt_of(TOKENS), 0)])
        with heard(publisher) as reader:
            knows(reader, 48)

    assert reader.counts["replayed"] == 1


def test_a_gap_is_replayed() -> None:
    with publishing() as publisher, heard(publisher) as reader:
        say_until_heard(publisher, reader)
        publisher.muted = True
        publisher.publish([publisher.stored(prompt_of(TOKENS), 0)])
        publisher.publish([publisher.removed(prompt_of(TOKENS).blocks[2:])])
        publisher.muted = False
        publisher.publish([publisher.stored(prompt_of([1] * 16), 0)])
        run(until(lambda: hits(reader.stored, [1] * 16) == 16))

        assert hits(reader.stored) == 32
        assert reader.counts["missed"] == 0
        assert reader.counts["replayed"] >= 2


def test_after_a_gap_that_cannot_be_replayed_nothing_before_it_counts() -> None:
    with publishing() as publisher, heard(publisher, replays=False) as reader:
        say_until_heard(publisher, reader)
        publisher.publish([publisher.stored(prompt_of(TOKENS), 0)])
        knows(reader, 48)
        publisher.muted = True
        publisher.publish([publisher.removed(prompt_of(TOKENS).blocks)])
        publisher.muted = False
        publisher.publish([publisher.stored(prompt_of([1] * 16), 0)])
        run(until(lambda: hits(reader.stored, [1] * 16) == 16))

        assert (hits(reader.stored), reader.counts["missed"]) == (0, 1)


def test_an_engine_that_began_anew_has_nothing_of_before() -> None:
    with publishing() as publisher:
        publisher.publish([publisher.stored(prompt_of(TOKENS), 0)])
        ports = publisher.port, publisher.replay_port or 0
        with heard(publisher) as reader:
            knows(reader, 48)
            publisher.publish([])
            publisher.close()
            with publishing(*ports) as again:

                async def work() -> None:
                    while hits(reader.stored, [1] * 16) != 16:
                        again.publish([again.stored(prompt_of([1] * 16), 0)])
                        await asyncio.sleep(0.01)

                run(work())
                assert hits(reader.stored) == 0


@pytest.mark.parametrize("payload", [b"\xc1", b"\x93\x01\x02\x03", b"\x92\x01\x91\x80"])
def test_a_batch_that_cannot_be_read_is_counted_and_nothing_before_it_counts(payload: bytes) -> None:
    with publishing() as publisher, heard(publisher) as reader:
        say_until_heard(publisher, reader)
        publisher.publish([publisher.stored(prompt_of(TOKENS), 0)])
        knows(reader, 48)
        publisher._events.send_multipart([b"", publisher._sequence.to_bytes(8, "big"), payload])
        run(until(lambda: reader.counts["unreadable"] == 1))

        assert hits(reader.stored) == 0


# -- in the gateway


def with_events(fleet: dict[str, Any], running: list[EmulatedWorker]) -> dict[str, Any]:
    """The fleet, each group with the ports of its worker."""
    for group, worker in zip(fleet["mixed"], running, strict=True):
        assert worker.kv_events is not None
        group |= {"kv_events_port": worker.kv_events.port, "kv_replay_port": worker.kv_events.replay_port}
    return fleet


def test_prompts_go_where_their_prefix_is_and_are_told_so() -> None:
    placement = {"prefill": "fcfs", "prefill_placement": "prefix-affinity", "decode_placement": "least-requests"}
    strategies = {"strategies": {"affine": placement | {"decode": "continuous"}}, "active": "affine"}

    async def work() -> tuple[list[tuple[str, int]], int]:
        wanted = [
            options(prefix_cache=True, kv_events_port=0, kv_replay_port=0, limits=Limits(kv_tokens=1600))
            for _ in range(2)
        ]
        async with workers(*wanted) as running:
            settings = settings_for(with_events(fleet_of(running), running), **strategies)
            # what an engine has from before the gateway began
            await call(running[1].address, "/v1/completions", asked([7] * 160))
            async with running_gateway(settings) as gateway:
                second = gateway.scheduler.instances["mixed-1"].prefill
                assert second is not None
                assert second.kv_events is not None
                stored_there = second.kv_events.stored
                await until(lambda: len(stored_there) == 10)
                seen: list[tuple[str, int]] = []
                ended = gateway.app._ended

                def note(call: Any, *how: Any) -> None:
                    seen.append((call.prefill.instance_id, call.expected_cached_tokens))
                    ended(call, *how)

                gateway.app._ended = note
                for tokens in ([7] * 160 + [8] * 5, [7] * 80 + [9] * 20, [5] * 50):
                    await call(gateway.server.address, "/v1/completions", asked(tokens))
                evicting = [asked([number] * 400) for number in range(20, 30)]
                for told in evicting:
                    await call(running[1].address, "/v1/completions", told)
                await until(lambda: stored_there.hit_tokens(token_blocks([7] * 160, 16)) == 0)
                return seen, len(stored_there)

    seen, left = run(work())

    assert seen[:2] == [("mixed-1", 160), ("mixed-1", 80)]
    assert seen[2][1] == 0
    assert left <= 100, "no more than fits"


def asked(tokens: list[int]) -> dict[str, Any]:
    return {"model": MODEL, "prompt": tokens, "max_tokens": 1}


def test_an_engine_that_publishes_nothing_is_served_all_the_same() -> None:
    async def work() -> int:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            async with workers(options()) as running:
                settings = settings_for(fleet_of(running, kv_events_port=port, kv_replay_port=port))
                async with running_gateway(settings) as gateway:
                    status, _ = await call(gateway.server.address, "/v1/completions", asked([1] * 100))
                    return status

    assert run(work()) == 200
