"""The routes of models and predictions: what they answer, what they refuse, and their OpenAPI under schemathesis."""

import tempfile
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from made_telemetry import PROFILE, decode_s, decode_steps, prefill_steps
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service.models.made_life import ID
from service.snapshots import call, settings_of

from kairos.predictors.artifact import dump
from kairos.predictors.training import train
from kairos.scheduler_core.service.app import create_app

_FOLDER = tempfile.TemporaryDirectory()
SETTINGS = settings_of(store={"url": f"sqlite:///{_FOLDER.name}/kairos.db"})
APP = create_app(SETTINGS)
ARTIFACT = dump(list(train([prefill_steps(), decode_steps()])))
BYTES = {"content-type": "application/octet-stream"}


def upload() -> str:
    """The id that a model was kept under."""
    answer = call(APP, "POST", "/models", content=ARTIFACT, headers=BYTES)
    assert answer.status_code == 201, answer.text
    (model_id,) = answer.json()["models"]
    return str(model_id)


def promote(model_id: str) -> httpx.Response:
    return call(APP, "POST", f"/models/{model_id}/promote", json={"reason": "test"})


def predicted(**step: Any) -> dict[str, Any]:
    answer = call(APP, "POST", "/predict", json={"steps": [{"profile": ID, **step}]})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["steps"][0])


def test_a_model_goes_up_is_promoted_predicts_and_comes_down_again() -> None:
    model_id = upload()
    name, version = model_id.rsplit("@", 1)
    told = promote(model_id).json()
    step = predicted(batch_size=16, sum_context_tokens=30_000)
    down = call(APP, "GET", f"/models/{name}/{version}/artifact")

    assert told == {"profile_id": ID, "serving": model_id}
    assert (step["kind"], step["model_version"]) == ("decode", model_id)
    assert step["median_s"] == pytest.approx(decode_s(16, 30_000), rel=0.02)
    assert 0 < step["lower_s"] <= step["median_s"] <= step["upper_s"]
    assert down.content == ARTIFACT


def test_after_a_promotion_decisions_name_the_model_and_after_a_rollback_the_one_before() -> None:
    first, second = upload(), upload()
    body = {"instances": [{"instance_id": "d", "role": "decode", "profile": ID}]}
    versions = []
    for model_id in (first, second):
        promote(model_id)
        versions.append(call(APP, "POST", "/schedule", json=body).json()["model_versions"][ID])
    back = call(APP, "POST", "/models/rollback", json={"profile_id": ID}).json()["serving"]
    versions.append(call(APP, "POST", "/schedule", json=body).json()["model_versions"][ID])

    assert versions == [first, second, first]
    assert back == first


def test_a_new_configuration_leaves_promoted_models_serving() -> None:
    model_id = upload()
    promote(model_id)
    APP.state.lifecycle.reload(lambda: SETTINGS)

    body = {"instances": [{"instance_id": "d", "role": "decode", "profile": ID}]}
    assert call(APP, "POST", "/schedule", json=body).json()["model_versions"][ID] == model_id


def test_the_list_tells_state_and_age_and_what_serves() -> None:
    model_id = upload()
    promote(model_id)
    shown = {model["id"]: model for model in call(APP, "GET", "/models").json()["models"]}
    serving = call(APP, "GET", "/models/serving").json()

    assert (shown[model_id]["serving"], shown[model_id]["state"]) == (True, "judged")
    assert 0 <= shown[model_id]["age_s"] < 600
    assert [model["id"] for model in serving["models"]] == [model_id]
    assert serving["troubles"] == []


def test_a_training_is_asked_for_and_can_be_followed() -> None:
    asked = call(APP, "POST", "/models/train", json={"profiles": [ID]})
    followed = call(APP, "GET", f"/models/trainings/{asked.json()['id']}")

    assert (asked.status_code, asked.json()["state"]) == (202, "waiting")
    assert followed.json() == asked.json()


def test_prefill_and_mixed_steps_are_told_apart() -> None:
    promote(upload())

    assert predicted(new_tokens=1000)["kind"] == "prefill"
    assert predicted(new_tokens=1000, batch_size=4, sum_context_tokens=400)["kind"] == "mixed"


@pytest.mark.parametrize(
    ("content", "status", "told"),
    [
        (b"", 422, "is not a Kairos model"),
        (b"no model", 422, "is not a Kairos model"),
        (ARTIFACT[:-30], 422, "is damaged"),
        (ARTIFACT.replace(ARTIFACT.split(b"\n")[1], b"0" * 16), 409, "was trained on features"),
    ],
)
def test_what_is_no_model_is_refused(content: bytes, status: int, told: str) -> None:
    answer = call(APP, "POST", "/models", content=content, headers=BYTES)

    assert answer.status_code == status
    assert told in answer.json()["detail"]


def test_a_model_that_cannot_predict_is_refused() -> None:
    (entry,) = train([decode_steps()])
    model = entry.models["decode"]
    model.surface.seconds[3][3] = float("nan")
    answer = call(APP, "POST", "/models", content=dump([entry]), headers=BYTES)

    assert answer.status_code == 422
    assert f"the model of {ID} is none to predict with" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "told"),
    [
        ("POST", f"/models/{ID}@99999/promote", {}, 404, "unknown model version"),
        ("POST", "/models/nobody@1/promote", {}, 404, "unknown model version"),
        ("POST", "/models/rollback", {"profile_id": "nobody"}, 409, "no model was ever promoted"),
        ("GET", "/models/nobody/1/artifact", None, 404, "unknown model version"),
        ("GET", "/models/trainings/99999", None, 404, "unknown training"),
        ("POST", "/predict", {"steps": [{"profile": "nonsense", "batch_size": 1}]}, 404, "unknown profile 'nonsense'"),
        ("POST", "/predict", {"steps": [{"profile": "a_b_c_0_1_d", "batch_size": 1}]}, 404, "unknown profile"),
        ("POST", "/predict", {"steps": [{"profile": ID}]}, 422, "steps[0]"),
        ("POST", "/predict", {"steps": [{"profile": ID, "batch": 1}]}, 422, "batch"),
        ("POST", "/models/train", {"profiles": []}, 422, "profiles"),
    ],
)
def test_bad_input_is_one_clear_problem(method: str, path: str, body: Any, status: int, told: str) -> None:
    answer = call(APP, method, path, json=body)

    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert told in answer.text


def test_a_configured_profile_that_nothing_was_learned_of_is_predicted_from_its_coefficients() -> None:
    body = {"steps": [{"profile": "even", "batch_size": 4, "sum_context_tokens": 400}]}
    step = call(APP, "POST", "/predict", json=body).json()["steps"][0]

    assert step["model_version"] == "linear"
    assert step["median_s"] == pytest.approx(0.014)


def test_a_profile_without_a_trained_model_is_predicted_from_the_closest() -> None:
    promote(upload())
    near = ID.replace(f"_{PROFILE.tp}_1_", "_2_1_")
    answer = call(APP, "POST", "/predict", json={"steps": [{"profile": near, "batch_size": 4}]})

    assert "closest profile" in answer.json()["steps"][0]["source"]


schema = schemathesis.openapi.from_asgi("/openapi.json", APP).include(path_regex="^/(models|predict)")


@schema.parametrize()
@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_the_schema_allows_or_forbids_is_answered_as_it_says(case: schemathesis.Case[Any]) -> None:
    # no schema can say which bytes are a model, or which steps have tokens
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
