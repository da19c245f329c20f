"""The forward pass is that of a Llama model, however its tokens are cut into steps."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'kairos-scheduler[torch]'")

from torches import CPU, TINY, config_of, plainly, prompt_of, tiny_weights  # noqa: E402

from kairos.adapters.torch_engine.build import ModelOptions, build  # noqa: E402
from kairos.adapters.torch_engine.kv import KvSlots  # noqa: E402
from kairos.adapters.torch_engine.model import Chunk, Model  # noqa: E402
from kairos.adapters.torch_engine.shape import shape_of  # noqa: E402
from kairos.adapters.torch_engine.weights import Weights, drawn  # noqa: E402
from kairos.scheduler_core.errors import InputError  # noqa: E402


def small_model(slots: int = 4, weights: Weights | None = None) -> Model:
    return Model(TINY, weights or tiny_weights(), KvSlots(TINY, slots, 256, CPU, torch.float32))


def continued(model: Model, slot: int, prompt: list[int], output_tokens: int, ends: list[int]) -> list[int]:
    """The greedy continuation, the prompt computed in chunks that end at `ends`."""
    for first, last in zip([0, *ends], [*ends, len(prompt)], strict=True):
        [newest] = model.step([Chunk(slot, first, prompt[first:last])])
    output = [newest]
    while len(output) < output_tokens:
        output += model.step([Chunk(slot, len(prompt) + len(output) - 1, output[-1:])])
    return output


@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 90), cuts=st.sets(st.integers(1, 89), max_size=5))
def test_any_chunks_of_a_prompt_give_the_tokens_of_a_plain_forward_pass(length: int, cuts: set[int]) -> None:
    prompt = prompt_of(length)

    output = continued(small_model(), 2, prompt, 4, sorted(cut for cut in cuts if cut < length))

    assert output == plainly(prompt, 4)


def test_sequences_that_share_steps_do_not_see_one_another() -> None:
    model, prompts = small_model(), [prompt_of(n) for n in (5, 40, 17)]

    first = model.step([Chunk(slot, 0, prompt) for slot, prompt in enumerate(prompts)])
    second = model.step([Chunk(slot, len(prompt), first[slot : slot + 1]) for slot, prompt in enumerate(prompts)])

    assert [list(pair) for pair in zip(first, second, strict=True)] == [plainly(prompt, 2) for prompt in prompts]


def test_a_decode_and_a_chunk_share_a_step() -> None:
    model, short, long = small_model(), prompt_of(9), prompt_of(60)
    [first] = model.step([Chunk(0, 0, short)])

    second, _ = model.step([Chunk(0, 9, [first]), Chunk(1, 0, long[:32])])
    third, told = model.step([Chunk(0, 10, [second]), Chunk(1, 32, long[32:])])

    assert [first, second, third] == plainly(short, 3)
    assert [told] == plainly(long, 1)


def test_kv_that_left_one_model_goes_on_in_another_and_only_whole() -> None:
    prompt, source, target = prompt_of(33), small_model(), small_model()
    source.step([Chunk(1, 0, prompt)])
    kv = source.cache.dump(1, 32)

    target.cache.load(3, 32, kv)
    output = continued(target, 3, prompt, 3, [32])

    assert output == plainly(prompt, 3)
    with pytest.raises(ValueError, match="KV of 31 tokens came as"):
        target.cache.load(3, 31, kv)


def huggingface(weights: Weights) -> dict[str, Any]:
    """The weights by the names that a Llama folder has."""
    heads, kv_heads = TINY.heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim
    told = {"model.embed_tokens": weights.embedding, "model.norm": weights.norm, "lm_head": weights.head}
    for n, layer in enumerate(weights.layers):
        at = f"model.layers.{n}"
        for name, part in zip("qkv", layer.qkv.split((heads, kv_heads, kv_heads)), strict=True):
            told[f"{at}.self_attn.{name}_proj"] = part
        for name, part in zip(("gate", "up"), layer.gate_up.chunk(2), strict=True):
            told[f"{at}.mlp.{name}_proj"] = part
        told |= {f"{at}.self_attn.o_proj": layer.out, f"{at}.mlp.down_proj": layer.down}
        told |= {f"{at}.input_layernorm": layer.attention_norm, f"{at}.post_attention_layernorm": layer.mlp_norm}
    return {f"{name}.weight": part.clone() for name, part in told.items()}


def test_a_local_folder_computes_what_its_weights_say(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = drawn(TINY, 7, CPU, torch.float32)
    save_file(huggingface(weights), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config_of(TINY))

    model = build(ModelOptions(str(tmp_path), slots=1, slot_tokens=64))

    prompt = prompt_of(20)
    assert continued(model, 0, prompt, 5, []) == plainly(prompt, 5, weights=weights)
    assert plainly(prompt, 5, weights=weights) != plainly(prompt, 5)


def test_a_folder_that_lacks_a_weight_is_refused_by_the_name_of_the_weight(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    held = huggingface(drawn(TINY, 7, CPU, torch.float32))
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config_of(TINY))

    with pytest.raises(InputError, match=r"no weight 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        build(ModelOptions(str(tmp_path), slots=1, slot_tokens=64))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "qwen2"}, "model_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"hidden_size": None}, "cannot read"),
    ],
)
def test_a_model_that_this_engine_would_compute_wrongly_is_refused(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(config_of(TINY, **changes))

    with pytest.raises(InputError, match=told):
        shape_of(str(tmp_path))


def test_an_unknown_shape_names_those_there_are() -> None:
    with pytest.raises(InputError, match="small, tiny"):
        shape_of("smal")


def test_a_device_that_is_not_there_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot make tiny on cuda:99"):
        build(ModelOptions("tiny", slots=1, slot_tokens=64, device="cuda:99"))
