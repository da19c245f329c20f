"""The life of a model, by REST alone: telemetry in, trained, promoted by the gate, drift, a better one, a bad one, back.

    python examples/control_plane.py --telemetry $KAIROS_DATA/telemetry      # on an SQLite file of its own
    python examples/control_plane.py --database postgresql://user@host/name  # after `kairos db upgrade`

Without --telemetry it makes some up. It starts a service of its own and ends it again.
"""

import argparse
import csv
import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CONFIG = Path(__file__).parent / "kairos.yaml"
KAIROS = [sys.executable, "-c", "from kairos.adapters.cli import main; main()"]
BATCH_ROWS = 10_000
PATIENCE_S = 180.0
HOUR_S = 3600.0
PROFILE_PARTS = ("gpu", "model", "precision", "tp", "ep", "engine")
NOT_KEPT = ("seq", "dp", "mean_context_tokens", "queued_requests", "source", "kind", "next_phase")

Row = dict[str, Any]


def main() -> None:
    """Tell the story; an error ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--telemetry", type=Path, help="a folder of telemetry files; default: made up")
    parser.add_argument("--database", help="address of the database; default: a new SQLite file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        telemetry = given.telemetry or made_up(Path(folder) / "telemetry")
        database = given.database or f"sqlite:///{folder}/kairos.db"
        with service(database) as client:
            Story(client).tell(telemetry)


class Story:
    """What happens, in order; each step of it is checked."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.began_s = time.monotonic()
        self.now_s = time.time() - 100 * HOUR_S
        """When the steps that are sent next ended."""

    def tell(self, telemetry: Path) -> None:
        """All of it."""
        decode = self.ingest_all(telemetry)
        profile, recording = longest(decode)
        first = self.train(f"the models of {profile} and all others")
        self.first_models_prove_themselves(first, decode)
        self.drift_is_noticed(profile, recording)
        self.better_model_is_promoted(profile, recording)
        self.bad_model_is_refused(profile, recording)
        self.roll_back(profile)

    def ingest_all(self, folder: Path) -> dict[str, list[Row]]:
        """Send every row; the decode steps by profile."""
        decode: dict[str, list[Row]] = {}
        stored = {"steps": 0, "requests": 0}
        for path in sorted(folder.glob("*.csv.gz")):
            kind = path.name.partition(".")[0]
            if kind not in ("prefill", "decode", "mixed", "request_latency"):
                continue
            of = "requests" if kind == "request_latency" else "steps"
            rows = list(read(path))
            stored[of] += self.send(of, rows)
            if kind == "decode":
                for row in rows:
                    if not row.get("flag") or row["flag"] in ("sweep", "real"):
                        decode.setdefault("|".join(str(row.get(part, "")) for part in PROFILE_PARTS), []).append(row)
        self.say(f"stored {stored['steps']} steps and {stored['requests']} requests")
        return decode

    def train(self, what: str) -> list[str]:
        """Have everything trained; ids of the models."""
        asked = self.post("/models/train")
        done = self.wait(lambda: ended(self.get(f"/models/trainings/{asked['id']}")), "the training")
        assert done["state"] == "done", done
        self.say(f"trained {what}: {len(done['models'])} challengers")
        return list(done["models"])

    def first_models_prove_themselves(self, models: list[str], decode: dict[str, list[Row]]) -> None:
        """Later steps judge them against the prior; where too few steps come, a person promotes."""
        for rows in decode.values():
            if len(rows) >= 2_000:
                self.send_over(rows, HOUR_S)
        judged = self.wait(lambda: [m for m in self.models() if "gate" in m["report"]], "the gate")
        promoted = self.wait(lambda: [m for m in self.get("/models/serving")["models"]], "a promotion by the gate")
        self.say(
            f"the gate looked at {len(judged)} models, and {len(promoted)} or more serve: {judged[0]['report']['gate']}"
        )
        served = {model["profile_id"] for model in promoted}
        for model in models:
            if model.rpartition("@")[0] not in served:
                self.post(f"/models/{model}/promote", {"reason": "too few steps for the gate"})
        self.say(f"promoted the others by hand: {len(self.get('/models/serving')['models'])} models serve")

    def models(self) -> list[Row]:
        """All of them."""
        models: list[Row] = self.get("/models")["models"]
        return models

    # -- talking to the service

    def get(self, path: str) -> Any:
        """The answer."""
        return self.client.get(path).raise_for_status().json()

    def post(self, path: str, body: Any = None) -> Any:
        """The answer."""
        answer = self.client.post(path, json={} if body is None else body)
        assert answer.is_success, (path, answer.text)
        return answer.json()
