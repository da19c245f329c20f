"""`load_settings`: one strict YAML file, then environment variables; every problem is named with its setting.

It is called once, where a process starts; everything else is handed the `Settings` or a part of it.
"""

import os
import re
from collections.abc import Hashable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kairos.scheduler_core.config import Loc, Settings, with_shipped
from kairos.scheduler_core.errors import ConfigError

PREFIX = "KAIROS_"


def load_settings(path: Path | None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of a YAML file, each overridden by its environment variable `KAIROS_SECTION__KEY` if that is set.

    The words of a variable lead to a setting: names in any case, '_' for '-', an index for a group of the fleet
    (`KAIROS_FLEET__PREFILL__0__COUNT`). Its value is read as YAML. Variables without '__' that name no setting
    (`KAIROS_DATA`) are others' business.

    Args:
        path: None: the environment alone.

    Raises:
        ConfigError: one line with every problem, each with the path of its setting.
    """
    document = {} if path is None else _beside(path, _read_yaml(path))
    where = "environment" if path is None else str(path)
    document["strategies"] = with_shipped(document.get("strategies"))
    origins = _apply_environment(document, environ)
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(problem, origins) for problem in error.errors())) from None


def _beside(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The document with model files that lie beside it found from any folder."""
    profiles = document.get("profiles")
    for profile in profiles.values() if isinstance(profiles, dict) else ():
        times = profile.get("step_times") if isinstance(profile, dict) else None
        if isinstance(times, dict) and isinstance(times.get("model"), str) and (path.parent / times["model"]).is_file():
            times["model"] = str(path.parent / times["model"])
    return document


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, refusing a key that is given twice (PyYAML lets the last one win)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.MarkedYAMLError(problem=f"'{name}' is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse_yaml(where: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: {error.problem or 'is not YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that cannot be
        raise ConfigError(f"{where}: is not YAML ({' '.join(str(error).split())})") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text (byte {error.start} is not UTF-8)") from None
    document = _parse_yaml(str(path), text)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: needs sections (profiles, fleet, ...), holds {_shown(document)}")
    return document


def _apply_environment(document: dict[str, Any], environ: Mapping[str, str]) -> dict[Loc, str]:
    """Write the variables into the document; which setting came from which variable."""
    origins: dict[Loc, str] = {}
    for variable in sorted(environ):
        words = variable.removeprefix(PREFIX).lower().split("__")
        if not variable.startswith(PREFIX) or (len(words) == 1 and words[0] not in Settings.model_fields):
            continue
        value = _parse_yaml(variable, environ[variable])
        node: Any = document
        loc: list[int | str] = []
        for depth, word in enumerate(words):
            key = _key(node, word)
            if key is None:
                place = _shown_path(loc)
                holds = "a secret" if loc and loc[0] in _SECRET_SECTIONS else _shown(node)
                raise ConfigError(f"{variable}: there is no '{word}' in {place}, which holds {holds}")
            loc.append(key)
            if depth == len(words) - 1:
                node[key] = value
            elif isinstance(node, dict):
                node = node.setdefault(key, {})
            else:
                node = node[key]
        origins[tuple(loc)] = variable
    return origins


def _key(node: Any, word: str) -> int | str | None:
    """What a word of a variable's name means in a section (its key) or a list (an index)."""
    if isinstance(node, dict):
        alike = (key for key in node if re.sub(r"\W", "_", str(key)).lower() == word)
        return next(alike, word)
    if isinstance(node, list) and word.isdecimal() and int(word) < len(node):
        return int(word)
    return None


_SECRET_SECTIONS = ("access", "store")


def _explain(problem: Mapping[str, Any], origins: Mapping[Loc, str]) -> str:
    loc: Loc = problem["loc"]
    text = problem["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    if problem["type"] == "extra_forbidden":
        text = _unknown(loc)
    elif problem["type"] == "missing":
        text = "is missing"
    elif loc[0] in _SECRET_SECTIONS:
        pass  # what was given may be the secret
    elif problem["type"] not in ("kairos", "value_error") or not isinstance(problem["input"], dict | None):
        text = f"{text}, got {_shown(problem['input'])}"
    depth = len(loc)
    origin = next(
        (f" (see {name})" for place, name in origins.items() if loc[: len(place)] == place or place[:depth] == loc), ""
    )
    return f"{_shown_path(loc)}: {text}{origin}"


def _unknown(loc: Loc) -> str:
    """That a setting does not exist, with the nearest of its section, found in the JSON schema."""
    schema = Settings.model_json_schema()
    node: dict[str, Any] = schema
    for part in loc[:-1]:
        node = node.get("properties", {}).get(part) or node.get("items") or node["additionalProperties"]
        node = next((option for option in node.get("anyOf", ()) if option.get("type") != "null"), node)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    known = sorted(node["properties"])
    near = get_close_matches(str(loc[-1]), known, n=1)
    return "unknown setting." + (f" Did you mean '{near[0]}'?" if near else "") + f" Known: {', '.join(known)}"


def _shown_path(loc: Iterable[int | str]) -> str:
    """A path as people write it.

    >>> _shown_path(("fleet", "prefill", 0, "count"))
    'fleet.prefill[0].count'
    """
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return shown.lstrip(".") or "the file"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
