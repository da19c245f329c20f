"""The thread beside an engine."""

import threading
from pathlib import Path
from typing import Any

import pytest

from kairos.adapters.embedded import background
from kairos.adapters.embedded.background import Background
from kairos.adapters.embedded.status import EngineStatus


class Hears:
    """A control plane that is spoken to."""

    def __init__(self) -> None:
        self.exchanges = threading.Semaphore(0)

    def exchange(self) -> None:
        self.exchanges.release()


def test_where_the_status_cannot_be_written_the_control_plane_is_spoken_to_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "PERIOD_S", 0.001)

    def status() -> EngineStatus:
        raise PermissionError("no writing here")

    hears: Any = Hears()
    thread = Background(status, tmp_path, hears)
    heard = [hears.exchanges.acquire(timeout=30) for _ in range(3)]
    thread.close()

    assert heard == [True] * 3
    assert [record.getMessage() for record in caplog.records] == ["kairos: no writing here; said once"]
