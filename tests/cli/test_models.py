"""`kairos models` and `kairos train --registry` against a service on a database of its own."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import kairos
from made_telemetry import PROFILE
from serving import served
from store.test_service import on

ID = PROFILE.profile_id
HEAD = "gpu,model,precision,tp,ep,engine,batch_size,sum_context_tokens,latency_ms\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service."""
    folder = tmp_path_factory.mktemp("registry")
    with served(on(f"sqlite:///{folder}/kairos.db")) as (address, _):
        yield address


@pytest.fixture(scope="module")
def telemetry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with decode steps of the profile."""
    path = tmp_path_factory.mktemp("telemetry") / "decode.csv"
    p = PROFILE
    rows = [
        f"{p.gpu},{p.model},{p.precision},{p.tp},{p.ep},{p.engine},{b},{b * c},{5 + 0.02 * b + 3e-5 * b * c}\n"
        for b in (1, 2, 4, 8, 16, 32)
        for c in range(200, 4_200, 200)
    ]
    path.write_text(HEAD + "".join(rows))
    return path


def test_a_model_is_registered_shown_promoted_and_rolled_back(service: str, telemetry: Path) -> None:
    trained = kairos("train", telemetry, "--registry", service, "--json")
    listed = kairos("models", "list", "--url", service)
    shown = kairos("models", "show", f"{ID}@1", "--url", service)
    promoted = kairos("models", "promote", f"{ID}@1", "--url", service, "--reason", "it looks good")
    serving = kairos("models", "list", "--url", service, "--json")
    back = kairos("models", "rollback", ID, "--url", service)

    assert json.loads(trained.stdout)["registered"] == [f"{ID}@1"]
    assert f"{ID}@1  challenger" in listed.stdout
    assert "decode: 120 measured decode steps" in shown.stdout
    assert promoted.stdout == f"{ID}: {ID}@1 serves\n"
    assert [model["serving"] for model in json.loads(serving.stdout)["models"]] == [True]
    assert back.stdout == f"{ID}: the configuration serves\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["models", "show", "nobody@1"], "unknown model 'nobody@1'"),
        (["models", "promote", "nobody@1"], "unknown model version 'nobody 1'"),
        (["models", "rollback", "nobody"], "no model was ever promoted for the profile 'nobody'"),
    ],
)
def test_what_is_not_there_ends_with_one_line(service: str, words: list[str], told: str) -> None:
    ended = kairos(*words, "--url", service)

    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"kairos: {told}")
    assert ended.stderr.count("\n") == 1


def test_without_a_control_plane_it_says_so() -> None:
    ended = kairos("models", "list", "--url", "http://127.0.0.1:9")

    assert ended.code == 1
    assert "no control plane answers at http://127.0.0.1:9" in ended.stderr
