"""Logs of the service: one event per thing that an operator would act on, as JSON lines or as text.

Of an exception that is not ours the message is left out, since it may quote what somebody sent; its type and the lines
it went through are told. No request is logged: that is what metrics, traces and decision records are for.
"""

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from kairos.scheduler_core.errors import KairosError

LogFormat = Literal["json", "text"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_LEVELS = {
    "kairos": logging.INFO,
    "opentelemetry": logging.CRITICAL,  # tracing.py counts what was not exported, and tells of the first
}


def configure_logging(log_format: LogFormat) -> None:
    """Send the log of this process to stderr, in one format; of other libraries what is a warning or worse."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else Text())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)


def told_of(record: logging.LogRecord) -> dict[str, Any]:
    """What is told of a record: when, how bad, by whom, what, and the fields beside it."""
    at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    told: dict[str, Any] = {
        "at": at,
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage().strip(),
    }
    told |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
    if record.exc_info and record.exc_info[1] is not None:
        told["error"] = [_error(error) for error in _chain(record.exc_info[1])]
    return told


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and what led to it, the latest first."""
    found: list[BaseException] = []
    while error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__ or error
    return found


def _error(error: BaseException) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    told: dict[str, Any] = {"type": type(error).__name__}
    if isinstance(error, KairosError):
        told["message"] = str(error)
    return told | {"frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]}


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return json.dumps(told_of(record), default=str)


class Text(logging.Formatter):
    """The same for people: when, how bad, what, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record; the lines that an exception went through stand below it."""
        told = told_of(record)
        errors: list[Mapping[str, Any]] = told.pop("error", [])
        head = " ".join(str(told.pop(name)) for name in ("at", "level", "logger", "event"))
        line = " ".join([head, *(f"{name}={value}" for name, value in told.items())])
        for error in errors:
            line += "\n  " + ": ".join(filter(None, (error["type"], error.get("message"))))
            line += "".join(f"\n    {frame}" for frame in error["frames"])
        return line
