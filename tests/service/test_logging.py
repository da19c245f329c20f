"""The log: one JSON object, or one text, an event; and of exceptions nothing that somebody sent."""

import json
import logging
import sys
from typing import Any

import pytest

from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.service.logging import JsonLines, Text


def record(message: str = "the service listens", **extra: Any) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "kairos.x", "levelno": 20, "levelname": "INFO", "msg": message, "created": 0.5}
    )
    vars(made).update(extra)
    return made


def raised(error: Exception) -> logging.LogRecord:
    """The record of an exception that was raised while another was handled."""
    try:
        try:
            raise KeyError("geheim")
        except KeyError as cause:
            raise error from cause
    except Exception:
        return record("it failed\n", exc_info=sys.exc_info())


def test_an_event_is_one_json_object_with_its_fields() -> None:
    assert json.loads(JsonLines().format(record(port=8011))) == {
        "at": "1970-01-01T00:00:00.500Z",
        "level": "info",
        "logger": "kairos.x",
        "event": "the service listens",
        "port": 8011,
    }


def test_an_event_is_one_line_of_text_with_its_fields() -> None:
    line = Text().format(record(port=8011))

    assert line == "1970-01-01T00:00:00.500Z info kairos.x the service listens port=8011"


@pytest.mark.parametrize("formatter", [JsonLines(), Text()])
def test_of_an_exception_the_type_and_the_way_are_told_and_its_message_is_not(formatter: logging.Formatter) -> None:
    line = formatter.format(raised(RuntimeError("geheim")))

    assert "RuntimeError" in line
    assert "KeyError" in line
    assert "test_logging.py" in line
    assert "geheim" not in line


def test_of_our_own_errors_the_message_is_told_too() -> None:
    line = json.loads(JsonLines().format(raised(StoreError("the database is full"))))

    assert [(e["type"], e.get("message")) for e in line["error"]] == [
        ("StoreError", "the database is full"),
        ("KeyError", None),
    ]
