"""The life of a model, by REST alone: trained, promoted by the gate, drift, a better one, a bad one refused, and back.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

CONFIG = Path(__file__).parent / "kairos.yaml"
KAIROS = [sys.executable, "-c", "from kairos.adapters.cli import main; main()"]
BATCH_ROWS = 10_000
PATIENCE_S = 240.0
HOUR_S = 3600.0
FOR_A_FIRST_MODEL, FOR_A_LOOK, FOR_A_REFERENCE = 2_000, 8_000, 20_000
"""Steps that the gate and the drift test want (docs/lifecycle.md)."""
EXCLUDED = {"outlier", "suspect", "composed", "context_not_recorded"}
ROUTES = {"prefill": "steps", "decode": "steps", "mixed": "steps", "request_latency": "requests"}

Row = dict[str, Any]


def main() -> None:
    """Tell the story; an error ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--telemetry", type=Path, help="a folder of telemetry files; default: made up")
    parser.add_argument("--database", help="address of the database; default: a new SQLite file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        telemetry = given.telemetry or made_up(Path(folder) / "telemetry")
        with service(given.database or f"sqlite:///{folder}/kairos.db") as client:
            Story(client).tell(telemetry)


class Story:
    """What happens, in order; every part of it is checked."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.began_s = time.monotonic()
        self.now_s = time.time() - 200 * HOUR_S
        """When the steps ended that are sent next."""

    def tell(self, telemetry: Path) -> None:
        """All of it."""
        recordings = self.ingest(telemetry)
        first = self.train()
        profile_id = self.first_models(first, recordings)
        recording = next(recording for recording in recordings if self.profile_of(recording) == profile_id)
        before = self.serving(profile_id)
        self.drift(profile_id, recording)
        better = self.better_challenger(profile_id, recording, before)
        self.bad_challenger(profile_id, recording, before)
        self.roll_back(profile_id, better)

    def ingest(self, folder: Path) -> list[list[Row]]:
        """Send every row of the files, as of before the story; the decode steps of each profile, as recorded."""
        stored = {"steps": 0, "requests": 0}
        recordings: dict[tuple[str, ...], list[Row]] = {}
        for path in sorted(folder.glob("*.csv.gz")):
            kind = path.name.removesuffix(".csv.gz")
            if kind not in ROUTES:
                continue
            rows = list(read(path))
            if ROUTES[kind] == "steps":
                rows = [{"ended_at_s": self.now_s} | row for row in rows]
            stored[ROUTES[kind]] += self.send(ROUTES[kind], rows)
            for row in rows if kind == "decode" else ():
                if not EXCLUDED & set(row.get("flag", "").split(";")):
                    key = tuple(str(row.get(part, "")) for part in ("gpu", "model", "precision", "tp", "ep", "engine"))
                    recordings.setdefault(key, []).append(row)
        self.say(f"stored {stored['steps']} steps and {stored['requests']} requests")
        return [rows for rows in recordings.values() if len(rows) >= FOR_A_FIRST_MODEL]

    def train(self) -> list[str]:
        """Have everything trained; ids of the models."""
        number = self.post("/models/train")["id"]
        done = self.wait("the training", lambda: ended(self.get(f"/models/trainings/{number}")))
        assert done["state"] == "done", done
        self.say(f"training {number} made {len(done['models'])} models; each is a challenger")
        return list(done["models"])

    def first_models(self, models: list[str], recordings: list[list[Row]]) -> str:
        """Later steps judge them against configuration and prior; where too few come, a person promotes.

        Returns: the profile whose decode model won by most.
        """
        for rows in recordings:
            self.send("steps", self.again(rows, 1.0, FOR_A_FIRST_MODEL + 500))
        judged = self.wait("the first looks", lambda: self.judged(models, len(recordings)))
        verdicts = [verdict["word"] for model in judged for verdict in model["report"]["gate"].values()]
        by_gate = verdicts.count("promote")
        assert by_gate, "the gate promoted nothing"
        serving = self.wait("their serving", lambda: enough(self.get("/models/serving")["models"], by_gate))
        self.say(f"the gate looked at {len(judged)} models: {by_gate} serve by its word")
        served = {model["profile_id"] for model in serving}
        by_hand = [model for model in models if model.rpartition("@")[0] not in served]
        for model in by_hand:
            self.post(f"/models/{model}/promote", {"reason": "too few steps for the gate"})
        self.say(f"{len(by_hand)} more by hand, since they see too few steps to be judged")
        return str(max(judged, key=decode_win)["profile_id"])

    def drift(self, profile_id: str, recording: list[Row]) -> None:
        """The same steps again for a reference, then a copy that takes 10 % longer."""
        self.send("steps", self.again(recording, 1.0, FOR_A_REFERENCE + 1_000))
        assert not self.trainings("drift"), "an alarm although nothing had changed"
        self.send("steps", self.again(recording, 1.1, 4_000))
        training = self.wait("the drift test", lambda: self.trainings("drift"))[0]
        assert training["profiles"] == [profile_id], training
        self.say(f"steps take 10 % longer: the drift test noticed, and asked for training {training['id']}")

    def better_challenger(self, profile_id: str, recording: list[Row], before: str) -> str:
        """The model of the changed steps wins on later ones; what serves then."""
        self.wait("its model", lambda: ended(self.trainings("drift")[0]))
        verdict = self.judge_decode(self.trainings("drift")[0]["models"], recording)
        assert verdict["word"] == "promote", verdict
        after = self.wait("its promotion", lambda: changed(self.serving(profile_id), before))
        self.say(f"{after} was promoted in place of {before}")
        return after

    def bad_challenger(self, profile_id: str, recording: list[Row], bad: str) -> None:
        """The model from before the change comes back as a challenger, and is refused."""
        name, version = bad.rsplit("@", 1)
        artifact = self.client.get(f"/models/{name}/{version}/artifact").raise_for_status().content
        headers = {"content-type": "application/octet-stream"}
        uploaded = self.client.post("/models", content=artifact, headers=headers).raise_for_status().json()["models"]
        verdict = self.judge_decode(uploaded, recording)
        assert verdict["word"] == "keep", verdict
        self.say(f"{uploaded[0]} was refused: {verdict['sentence']}")

    def roll_back(self, profile_id: str, serving: str) -> None:
        """One call; a decision names the model that it was made with."""
        assert self.serving(profile_id) == serving
        back = self.post("/models/rollback", {"profile_id": profile_id})["serving"]
        answer = self.post("/schedule", {"instances": [decode_instance(profile_id)]})
        assert answer["model_versions"] == {profile_id: back}, answer["model_versions"]
        self.say(f"rolled back from {serving} to {back}, which the next decision was made with")

    def judge_decode(self, models: list[str], recording: list[Row]) -> Row:
        """Send changed steps until the gate has seen enough of them; what it says of the one model."""
        rows, sent = FOR_A_LOOK + 1_000, 0
        while True:
            self.send("steps", self.again(recording, 1.1, rows))
            sent += rows
            verdict: Row = self.wait("a look at all of them", partial(self.looked, models, 0.8 * sent))
            if verdict["word"] != "wait":
                return verdict
            self.say(f"the gate waits: {verdict['sentence']}")
            rows = sent // 2 + 1_000

    # -- what is asked

    def looked(self, models: list[str], least: float) -> Row | None:
        """What the gate said of decode steps once it had at least so many."""
        verdicts = [model["report"]["gate"].get("decode") for model in self.judged(models, 0)]
        return next((verdict for verdict in verdicts if verdict and verdict["rows"] >= least), None)

    def judged(self, models: list[str], least: int) -> list[Row]:
        """Those of the models that the gate has looked at, once there are enough."""
        return enough(
            [m for m in self.get("/models")["models"] if m["id"] in models and m["report"].get("gate")], least
        )

    def trainings(self, cause: str) -> list[Row]:
        """Of one cause, the latest first."""
        return [training for training in self.get("/models")["trainings"] if training["cause"] == cause]

    def serving(self, profile_id: str) -> str:
        """The id of the model that serves a profile."""
        return str(next(m["id"] for m in self.get("/models/serving")["models"] if m["profile_id"] == profile_id))

    def profile_of(self, recording: list[Row]) -> str:
        """The id of the profile that these steps are of."""
        parts = [str(recording[0].get(part, 1)) for part in ("gpu", "model", "precision", "tp", "ep", "engine")]
        served = [model["profile_id"] for model in self.get("/models/serving")["models"]]
        plain = "".join(part for part in "".join(parts).lower() if part.isalnum())
        return str(next(name for name in served if "".join(c for c in name if c.isalnum()) == plain))

    def again(self, recording: list[Row], factor: float, count: int) -> Iterator[Row]:
        """`count` steps of a recording over three hours, which took `factor` times as long, from the first on again."""
        for number in range(count):
            row = recording[number % len(recording)]
            self.now_s += 3 * HOUR_S / count
            yield row | {"latency_ms": factor * row["latency_ms"], "ended_at_s": self.now_s}

    # -- how it is asked

    def send(self, what: str, rows: Iterable[Row]) -> int:
        """Send rows in batches; how many were stored."""
        stored, batch = 0, list[Row]()
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                stored += self.post(f"/telemetry/{what}", batch)["stored"]
                batch = []
        return stored + (self.post(f"/telemetry/{what}", batch)["stored"] if batch else 0)

    def get(self, path: str) -> Any:
        """The answer to a question."""
        return self.client.get(path).raise_for_status().json()

    def post(self, path: str, body: Any = None) -> Any:
        """The answer to an order."""
        content = gzip.compress(json.dumps(body or {}).encode(), 1) if path.startswith("/telemetry") else None
        if content:
            headers = {"content-type": "application/json", "content-encoding": "gzip"}
            answer = self.client.post(path, content=content, headers=headers)
        else:
            answer = self.client.post(path, json=body or {})
        assert answer.is_success, f"{path}: {answer.text[:300]}"
        return answer.json()

    def wait(self, what: str, look: Callable[[], Any]) -> Any:
        """What a look finds, as soon as it finds something."""
        until_s = time.monotonic() + PATIENCE_S
        while not (found := look()):
            assert time.monotonic() < until_s, f"{what} did not come within {PATIENCE_S:.0f} s"
            time.sleep(0.25)
        return found

    def say(self, text: str) -> None:
        """One line of the story."""
        print(f"{time.monotonic() - self.began_s:6.1f} s  {text}", flush=True)


def enough(found: list[Row], least: int) -> list[Row]:
    """What was found, once there is enough of it."""
    return found if len(found) >= least else []


def ended(training: Row) -> Row | None:
    """The training, once it has."""
    return training if training["ended_at"] else None


def changed(now: str, before: str) -> str | None:
    """What is now, once it is something else."""
    return now if now != before else None


def decode_win(model: Row) -> float:
    """How surely the gate promoted its decode steps: t of the gain."""
    verdict = model["report"]["gate"].get("decode", {"word": "keep"})
    return float(verdict["checks"]["t"]["value"]) if verdict["word"] == "promote" else 0.0


def decode_instance(profile_id: str) -> Row:
    """One instance for a snapshot."""
    return {"instance_id": "decode-0", "role": "decode", "profile": profile_id}


def read(path: Path) -> Iterator[Row]:
    """Rows of a telemetry file with numbers as numbers; empty cells are left out."""
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            yield {name: number(value) for name, value in row.items() if value != ""}


def number(text: str) -> Any:
    """A number where it is one."""
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() and "." not in text else value


def made_up(folder: Path) -> Path:
    """Telemetry of three profiles."""
    from kairos.adapters.traces.synthetic_telemetry import write_telemetry

    write_telemetry(folder, seed=0)
    return folder


@contextmanager
def service(database: str) -> Iterator[httpx.Client]:
    """A running service on a free port, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*KAIROS, "serve", "--config", str(CONFIG), "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"KAIROS_STORE__URL": database})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(600):
                assert process.poll() is None, "the service did not start"
                try:
                    client.get("/readyz").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


if __name__ == "__main__":
    main()
