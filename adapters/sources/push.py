"""Rows to the control plane, in batches; while it is away they wait, up to a limit, and the oldest are dropped."""

import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

import httpx
import msgspec

from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.telemetry import SampleRow, StepRow

TIMEOUT_S = 10.0
KEPT_ROWS = 200_000
BATCH_ROWS = 10_000

Kind = Literal["steps", "samples"]


class Batch(NamedTuple):
    """Rows that were named once, so that sent twice they are stored once."""

    batch_id: str
    kind: Kind
    rows: Sequence[StepRow] | Sequence[SampleRow]


class Told(msgspec.Struct, frozen=True):
    """What the control plane answers, as far as it matters here."""

    stored: int
    rejected: int


_answer = msgspec.json.Decoder(Told)


class Push:
    """Sends to one control plane.

    Args:
        url: its address.
        key: sent as a bearer token; empty: none is sent.
    """

    def __init__(self, url: str, key: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the control plane's address is '{url}'; give http://HOST:PORT")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)
        self._run = uuid.uuid4().hex
        self._named = 0
        self._batches: deque[Batch] = deque()
        self._kept_rows = 0
        self._wait_until_s = 0.0
        self.counts: Counter[str] = Counter()
        """Rows: stored, rejected, dropped."""
        self.problem = ""
        """Why the last batch was not taken; empty: it was."""

    @property
    def waiting_rows(self) -> int:
        """Rows that are not delivered yet."""
        return self._kept_rows

    def add(self, kind: Kind, rows: Sequence[StepRow] | Sequence[SampleRow]) -> None:
        """Have rows sent by the next `flush`."""
        for start in range(0, len(rows), BATCH_ROWS):
            self._named += 1
            self._batches.append(Batch(f"{self._run}/{self._named}", kind, rows[start : start + BATCH_ROWS]))
            self._kept_rows += len(self._batches[-1].rows)
        while self._kept_rows > KEPT_ROWS:
            self._drop("dropped")

    def flush(self) -> None:
        """Send what waits, oldest first, until the control plane does not take it.

        Raises:
            ConfigError: it refuses the key.
        """
        while self._batches and time.monotonic() >= self._wait_until_s:
            if not self._send(self._batches[0]):
                return

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def _send(self, batch: Batch) -> bool:
        """Whether the batch is done with."""
        headers = {"content-type": "application/json", "x-kairos-batch-id": batch.batch_id}
        try:
            answer = self._client.post(
                f"/telemetry/{batch.kind}", content=msgspec.json.encode(batch.rows), headers=headers
            )
        except httpx.HTTPError as error:
            self.problem = f"does not answer: {error}"
            return False
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"the control plane answers {answer.status_code}; set KAIROS_API_KEY to a key that may write"
            )
        if answer.status_code == 429 or answer.status_code >= 500:
            self.problem = f"answers {answer.status_code}"
            self._wait_until_s = time.monotonic() + _seconds(answer.headers.get("retry-after"))
            return False
        try:
            told = _answer.decode(answer.content) if answer.is_success else None
        except msgspec.MsgspecError:
            self.problem = "answers what Kairos would not; check its address"
            return False
        if told is None:
            self.problem = f"answers {answer.status_code} to a batch, which is given up"
            self._drop("rejected")
        else:
            self.problem = ""
            self.counts["stored"] += told.stored
            self.counts["rejected"] += told.rejected
            self._drop()
        return True

    def _drop(self, outcome: str | None = None) -> None:
        rows = len(self._batches.popleft().rows)
        self._kept_rows -= rows
        if outcome:
            self.counts[outcome] += rows


def _seconds(retry_after: str | None) -> float:
    """How long to wait (RFC 9110, Retry-After in seconds), at most a minute; 1 s where it does not say."""
    return min(60.0, float(retry_after)) if retry_after and retry_after.isdecimal() else 1.0
