"""What real engines say of their KV caches, as the gateway hears it."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine.engines import VERSIONS, Engine, free_port, prompt_of, serve

from kairos.adapters.gateway.kv_events import KvEventReader, token_blocks

pytestmark = pytest.mark.engine


def cached_tokens(engine: Engine, prompt: list[int]) -> int:
    """How much of a prompt it finds in its cache, by its own usage."""
    body = {"model": "small", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    usage: dict[str, Any] = httpx.post(f"{engine.url}/v1/completions", json=body, timeout=300).json()["usage"]
    return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def known_tokens(reader: KvEventReader, prompt: list[int], computed: int) -> int:
    """How much of a prompt the gateway takes to be there, once it has heard of all that was computed of it."""
    for _ in range(300):
        size = reader.stored.block_tokens
        found = reader.stored.hit_tokens(token_blocks(prompt, size)) if size else 0
        if size and found == computed - computed % size:
            return found
        time.sleep(0.1)
    raise AssertionError(f"heard of {len(reader.stored)} blocks: {reader.counts}")


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_real_vllm_says_of_its_cache_is_what_it_then_finds_there(version: str, tmp_path: Path) -> None:
    port, replay = free_port(), free_port()
    told = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"}
    events = json.dumps(told | {"replay_endpoint": f"tcp://*:{replay}"})
    arguments = ("--enable-prefix-caching", "--enable-prompt-tokens-details", "--kv-events-config", events)
    first, second = prompt_of(400, 1), prompt_of(1000, 2)
    with serve(version, tmp_path, *arguments, plugin=False) as engine:
        assert cached_tokens(engine, first) == 0
        reader = KvEventReader(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{replay}")
        reader.start()
        try:
            before = known_tokens(reader, first, 400)  # said before it was heard
            assert cached_tokens(engine, second) == 0
            known_tokens(reader, second, 1000)
            longer = second[:600] + prompt_of(100, 3)
            expected = known_tokens(reader, longer, 600)
            found = cached_tokens(engine, longer), cached_tokens(engine, first)
        finally:
            reader.close()

    assert found == (expected, before)
    assert reader.counts["unreadable"] == reader.counts["missed"] == 0
    assert reader.counts["replayed"] >= 1
