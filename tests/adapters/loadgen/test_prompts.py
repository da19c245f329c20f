"""Prompts of exactly the lengths of a trace, with its prefixes in common and no others."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulations import workload

from kairos.adapters.loadgen.prompts import prompt_json

BLOCK = 16


def prompts(lengths: list[int], block_ids: list[tuple[int, ...]] | None = None) -> list[list[int]]:
    requests = replace(
        workload([0.0] * len(lengths), lengths), block_ids=block_ids, block_tokens=BLOCK if block_ids else 0
    )
    return [json.loads(prompt_json(requests, row)) for row in range(len(lengths))]


def common(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 3_000), min_size=1, max_size=4))
def test_a_prompt_is_as_long_as_the_trace_says_of_ids_that_every_model_has(lengths: list[int]) -> None:
    made = prompts(lengths)

    assert [len(prompt) for prompt in made] == lengths
    assert all(100 <= token < 1_000 for prompt in made for token in prompt)


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, BLOCK), st.integers(min_value=0))
def test_two_prompts_have_in_common_what_their_block_ids_have_in_common(
    shared: int, own: int, last: int, first_id: int
) -> None:
    length = (shared + own - 1) * BLOCK + last
    ids = [tuple(range(first_id, first_id + shared)) for _ in range(2)]
    ids = [head + tuple(range(first_id + 100 * k, first_id + 100 * k + own)) for k, head in enumerate(ids, start=1)]

    one, other = prompts([length, length], ids)

    assert common(one, other) // BLOCK == shared
    assert len(one) == length


def test_requests_without_block_ids_have_no_block_in_common() -> None:
    one, other = prompts([500, 500])

    assert common(one, other) < BLOCK


@pytest.mark.parametrize("length", [BLOCK // 2, 3 * BLOCK + 5])
def test_lengths_hold_where_the_block_ids_are_of_another_length(length: int) -> None:
    assert len(prompts([length], [(7, 8)])[0]) == length


def test_a_prompt_longer_than_the_filler_is_whole() -> None:
    assert len(prompts([1_100_000])[0]) == 1_100_000
