"""Prompts are counted as their engine counts them, once the gateway has the model's tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from emulated import MODEL, call, options, run
from gateways import behind_gateway, settings_for

from kairos.adapters.gateway.bodies import Body
from kairos.adapters.gateway.counting import TokenCounter
from kairos.adapters.gateway.gateway import Gateway
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.errors import ConfigError

tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'none' %}{{ raise_exception('no such role') }}{% endif %}
<|{{ message.role }}|> {% generation %}{{ message.content }}{% endgeneration %} <|end|>
{% endfor %}
{% if tools %}<|tools|> {{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
WORDS = ["<unk>", "<s>", "<|user|>", "<|assistant|>", "<|tools|>", "<|end|>", "one", "two", "three"]


def model_folder(folder: Path, template: str | None = TEMPLATE, **config: Any) -> Path:
    """A model of nine words, whose prompts begin with <s>."""
    vocabulary = {word: place for place, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:6])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(4)  # of training; prompts are not cut
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"bos_token": {"content": "<s>"}} | ({} if template is None else {"chat_template": template}) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def tokens_of(counter: TokenCounter, chat: bool, **fields: Any) -> list[list[str]]:
    """The tokens of a request as words."""
    found = counter.tokens_now(Body(json.dumps({"model": MODEL, **fields}).encode()), chat)
    assert found is not None
    return [[WORDS[token] for token in prompt] for prompt in found]


def test_text_prompts_are_counted_whole_with_what_the_tokenizer_adds(tmp_path: Path) -> None:
    counter = TokenCounter(model_folder(tmp_path))

    assert tokens_of(counter, False, prompt="one two three one two three") == [["<s>", *["one", "two", "three"] * 2]]
    assert tokens_of(counter, False, prompt=["one", "two"]) == [["<s>", "one"], ["<s>", "two"]]
    assert tokens_of(counter, False, prompt="one", add_special_tokens=False) == [["one"]]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_chats_are_counted_as_the_template_writes_them(tmp_path: Path, place: str) -> None:
    in_config = place == "tokenizer_config.json"
    model_folder(tmp_path, TEMPLATE if in_config else None)
    if not in_config:
        (tmp_path / place).write_text(TEMPLATE)
    parts = [{"type": "text", "text": "two"}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": parts}]

    expected = ["<s>", "<|user|>", "one", "<|end|>", "<|user|>", "two", "<|end|>", "<|assistant|>"]
    assert tokens_of(TokenCounter(tmp_path), True, messages=messages) == [expected]


def test_tools_and_template_arguments_are_part_of_a_chat(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "one"},
        {"name": "tool_use", "template": "{{ tools | tojson }} {{ word }}"},
    ]
    counter = TokenCounter(model_folder(tmp_path, None, chat_template=named))
    messages = [{"role": "user", "content": "x"}]

    assert tokens_of(counter, True, messages=messages) == [["one"]]
    told = {"messages": messages, "tools": ["two"], "chat_template_kwargs": {"word": "three"}}
    assert tokens_of(counter, True, **told) == [["<unk>", "three"]]


def test_what_a_template_refuses_is_left_to_the_engine(tmp_path: Path) -> None:
    counter = TokenCounter(model_folder(tmp_path))
    odd = [{"messages": [{"role": "none", "content": "x"}]}, {"messages": "x"}, {"messages": [1]}]

    bodies = [Body(json.dumps({"model": MODEL, **told}).encode()) for told in odd]
    assert [counter.tokens_now(body, True) for body in bodies] == [None] * 3


def test_a_template_reaches_nothing_outside_its_sandbox(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__ }}{% set _ = messages.append(1) %}"
    body = Body(json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode())

    assert TokenCounter(model_folder(tmp_path, escape)).tokens_now(body, True) is None


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", None, "there is no .*tokenizer.json; give the folder of a model"),
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("tokenizer_config.json", "{", "is no JSON"),
        ("tokenizer_config.json", "[]", "is no JSON object"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "neither text nor named templates"),
        ("chat_template.jinja", "{% for %}", "chat_template.jinja cannot be read: line 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_at_the_start(
    tmp_path: Path, file: str, content: str | None, says: str
) -> None:
    model_folder(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    settings = settings_for({"mixed": [{"profile": "p", "url": "http://h:1"}]}, {"tokenizers": {MODEL: str(tmp_path)}})

    with pytest.raises(ConfigError, match=says):
        Gateway(settings, step_times_of)


def test_requests_wait_with_the_tokens_that_were_counted(tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path))
    image = {"type": "image_url", "image_url": {"url": "data:" + "x" * 4000}}
    asked = [
        ("/v1/completions", {"prompt": "one two three"}),
        ("/v1/completions", {"prompt": [6, 7]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "one"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "none", "content": "x" * 400}]}),
    ]

    async def work() -> tuple[list[int], int]:
        seen: list[int] = []
        settings = {"tokenizers": {MODEL: folder}, "media_tokens": 100}
        async with behind_gateway(options(), gateway=settings) as (gateway, _):
            ended = gateway.app._ended
            gateway.app._ended = lambda call, *how: (seen.append(call.prompt_tokens), ended(call, *how))[1]
            for path, told in asked:
                status, _ = await call(gateway.server.address, path, {"model": MODEL, "max_tokens": 1, **told})
                assert status == 200
            return seen, gateway.metrics.uncounted[MODEL]

    seen, uncounted = run(work())

    assert seen[:4] == [4, 2, 5, 4 + 100]
    assert seen[4] > 50, "estimated by its bytes"
    assert uncounted == 1
