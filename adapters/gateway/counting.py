"""Counting the tokens of text prompts as their engine does: the model's tokenizer and its chat template.

Needs the extra `tokenizers`. What a template or a tokenizer does with a prompt stays in its thread; nothing is kept.
"""

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from kairos.adapters.gateway.bodies import Body
from kairos.scheduler_core.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TokenCounter:
    """Counts for one model.

    Args:
        folder: of the model, with `tokenizer.json`; the chat template is in `chat_template.jinja` there, or in
            `tokenizer_config.json`.

    Raises:
        ConfigError: a file is missing or cannot be used, or the extra is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _tokenizer_of(folder)
        told = _json_of(folder / "tokenizer_config.json")
        self._special = {name: _text_of(told[name]) for name in _SPECIAL if told.get(name)}
        self._templates = _templates_of(folder, told)

    async def tokens(self, body: Body, chat: bool) -> list[list[int]] | None:
        """The tokens of each prompt of a request, counted in a thread; None where its engine must say what is wrong."""
        return await asyncio.to_thread(self.tokens_now, body, chat)

    def tokens_now(self, body: Body, chat: bool) -> list[list[int]] | None:
        """The same, at once."""
        try:
            texts, special = self._rendered(body) if chat else _prompts_of(body)
            return [encoded.ids for encoded in self._tokenizer.encode_batch(texts, add_special_tokens=special)]
        except Exception:  # a template's: it says what it thinks of messages by raising
            return None

    def _rendered(self, body: Body) -> tuple[list[str], bool]:
        """A chat as the model gets it."""
        asked: dict[str, Any] = {
            name: msgspec.json.decode(body.fields[name])
            for name in ("messages", "tools", "documents", "add_generation_prompt", "chat_template_kwargs")
            if name in body.fields
        }
        tools = asked.get("tools") or None
        template = self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]
        told: dict[str, Any] = {"add_generation_prompt": asked.get("add_generation_prompt", True)}
        told |= {"tools": tools, "documents": asked.get("documents")} | (asked.get("chat_template_kwargs") or {})
        messages = [message | {"content": _text_in(message.get("content"))} for message in asked["messages"]]
        return [template.render(**self._special, **told | {"messages": messages})], False


def _prompts_of(body: Body) -> tuple[list[str], bool]:
    prompt = body.prompts()
    special = body.fields.get("add_special_tokens", b"true")
    return [prompt] if isinstance(prompt, str) else list(prompt), bytes(special) != b"false"


def _text_in(content: object) -> object:
    """The text of a message, as engines hand it to templates that know nothing of parts."""
    if not isinstance(content, list):
        return content
    return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)


def _tokenizer_of(folder: Path) -> "Tokenizer":
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(
            "gateway.tokenizers needs the package tokenizers; pip install 'kairos-scheduler[tokenizers]'"
        ) from None
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"gateway.tokenizers: there is no {path}; give the folder of a model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as problem:  # the library's errors have no class of their own
        raise ConfigError(f"gateway.tokenizers: {path} is no tokenizer: {problem}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_bytes())
    except ValueError as problem:
        raise ConfigError(f"gateway.tokenizers: {path} is no JSON: {problem}") from None
    if not isinstance(told, dict):
        raise ConfigError(f"gateway.tokenizers: {path} is no JSON object")
    return told


def _text_of(token: object) -> str:
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)


def _templates_of(folder: Path, told: dict[str, Any]) -> "dict[str, Template]":
    """The chat templates by name; none where the model is not for chats."""
    file = folder / "chat_template.jinja"
    found = file.read_text(encoding="utf-8") if file.is_file() else told.get("chat_template")
    if found is None:
        return {}
    where = file if file.is_file() else folder / "tokenizer_config.json"
    try:
        named = {"default": found} if isinstance(found, str) else {each["name"]: each["template"] for each in found}
    except (TypeError, KeyError):
        raise ConfigError(f"gateway.tokenizers: chat_template in {where} is neither text nor named templates") from None
    return {name: _compiled(template, where) for name, template in named.items()}


def _compiled(source: str, where: Path) -> "Template":
    """A template in a sandbox that offers what Hugging Face's does."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The marks around what an assistant says, which only training needs."""

        tags = {"generation"}  # noqa: RUF012  # as the base class has it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda text: datetime.now().strftime(text)}
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as problem:
        raise ConfigError(
            f"gateway.tokenizers: the chat template in {where} cannot be read: line {problem.lineno}: {problem.message}"
        ) from None
