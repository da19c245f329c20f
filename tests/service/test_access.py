"""Keys and roles: what each may call, what others are answered, and what is said of a key."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from service.snapshots import call, settings_of
from serving import CONFIG

from kairos.scheduler_core.config import ROLES, Settings
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.service.access import RULES, rule_for, tenant_of
from kairos.scheduler_core.service.app import create_app

SECRETS = {role: f"kairos_{role}_0123456789abcdefghijklmnop" for role in ROLES}
TENANT = "kairos_acme_0123456789abcdefghijklmnop"


def with_keys(**sections: Any) -> Settings:
    """Settings with a key of each role, and one for the tenant acme."""
    keys: dict[str, dict[str, str]] = {role: {"key": SECRETS[role], "role": role} for role in ROLES}
    keys["of-acme"] = {"key": TENANT, "role": "operate", "tenant": "acme"}
    return settings_of(access={"keys": keys}, **sections)


APP = create_app(with_keys())
READ = {"authorization": f"Bearer {SECRETS['read']}"}
DOCUMENT: dict[str, Any] = call(APP, "GET", "/openapi.json", headers=READ).json()
OPERATIONS = [(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_health_and_readiness_need_no_key() -> None:
    assert [call(APP, "GET", path).status_code for path in ("/healthz", "/readyz")] == [200, 200]


@pytest.mark.parametrize("path", ["/schedule", "/strategies", "/openapi.json", "/docs", "/nowhere"])
def test_everything_else_needs_one(path: str) -> None:
    answer = call(APP, "POST" if path == "/schedule" else "GET", path)

    assert answer.status_code == answer.json()["status"] == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {SECRETS['read']}", SECRETS["read"], "Bearer \xff"]
)
def test_a_header_without_a_key_in_force_is_answered_as_none(header: str) -> None:
    assert call(APP, "GET", "/strategies", headers={"authorization": header.encode("latin-1")}).status_code == 401


def test_the_word_bearer_may_be_written_in_any_case() -> None:
    answer = call(APP, "GET", "/strategies", headers={"authorization": f"bEARER {SECRETS['read']}"})

    assert answer.status_code == 200


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=" ".join)
def test_each_route_takes_the_roles_from_its_own_upwards_and_no_other(method: str, path: str) -> None:
    needed = rule_for(method.upper(), path).role
    allowed = ROLES if needed is None else ROLES[ROLES.index(needed) :]

    refused = [role for role in ROLES if call(APP, method, path, headers=bearer(SECRETS[role])).status_code == 403]

    assert refused == [role for role in ROLES if role not in allowed]


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("POST", "/schedule", "schedule"),
        ("GET", "/schedule", "read"),
        ("GET", "/metrics", "read"),
        ("GET", "/strategies/active", "read"),
        ("PUT", "/strategies/active", "operate"),
        ("POST", "/requests", "schedule"),
        ("POST", "/requests/r-1/events", "schedule"),
        ("DELETE", "/requests/r-1", "schedule"),
        ("GET", "/requests/r-1/explanation", "read"),
        ("POST", "/telemetry/steps", "schedule"),
        ("POST", "/predict", "schedule"),
        ("PUT", "/experiments/e-1/reports/gateway-1", "schedule"),
        ("POST", "/experiments", "operate"),
        ("POST", "/models/train", "operate"),
        ("PUT", "/instances/a/b", "operate"),
        ("GET", "/healthz", None),
        ("POST", "/healthz", "operate"),
        ("GET", "/healthz/", "read"),
        ("GET", "/healthz\n", "read"),
        ("POST", "/schedule\n", "operate"),
        ("BREW", "", "operate"),
    ],
)
def test_the_table_gives_every_request_a_role(method: str, path: str, role: str | None) -> None:
    assert rule_for(method, path).role == role


def test_only_health_and_readiness_are_open_in_the_table() -> None:
    assert [rule.path for rule in RULES if rule.role is None] == ["/(healthz|readyz)"]


def test_a_key_of_a_tenant_reaches_the_routes_about_its_requests_and_no_other() -> None:
    seen: list[str | None] = []
    app = create_app(with_keys())

    @app.get("/requests/{request_id}/asked")
    def asked(request: Request) -> None:
        seen.append(tenant_of(request.scope))

    own = call(app, "GET", "/requests/r-1/asked", headers=bearer(TENANT))
    anyones = call(app, "GET", "/requests/r-1/asked", headers=READ)
    others = call(app, "GET", "/strategies", headers=bearer(TENANT))

    assert (own.status_code, anyones.status_code, others.status_code) == (200, 200, 403)
    assert seen == ["acme", None]


def test_a_request_that_is_refused_is_not_read() -> None:
    async def never() -> Any:
        raise AssertionError("the body was read")
        yield b""

    assert call(APP, "POST", "/schedule", content=never()).status_code == 401


def test_no_answer_and_no_document_holds_a_key() -> None:
    answers = [call(APP, method, path, headers=READ) for method, path in OPERATIONS]
    told = " ".join(answer.text + str(answer.headers) for answer in answers) + str(DOCUMENT)

    assert not [secret for secret in (*SECRETS.values(), TENANT) if secret in told]


@pytest.mark.parametrize(
    "access",
    [
        {"keys": {"a": {"key": "geheim", "role": "read"}}},
        {"keys": {"a": {"key": "geheim" * 9, "role": "reed"}}},
        {"keys": {"a": "geheim"}},
        {"keys": {"a": {"key": ["geheim"], "role": "read"}}},
        {"keys": ["geheim"]},
        "geheim",
    ],
)
def test_a_wrong_key_in_the_configuration_is_refused_without_being_shown(access: Any, tmp_path: Path) -> None:
    (tmp_path / "kairos.yaml").write_text("profiles: {}\nfleet: {}\n")

    with pytest.raises(ConfigError, match="access") as raised:
        load_settings(tmp_path / "kairos.yaml", {"KAIROS_ACCESS": str(access)})

    assert "geheim" not in str(raised.value)


def test_a_key_of_the_configuration_comes_from_the_environment_too(tmp_path: Path) -> None:
    environment = {
        "KAIROS_ACCESS__KEYS__GATEWAY__KEY": SECRETS["schedule"],
        "KAIROS_ACCESS__KEYS__GATEWAY__ROLE": "schedule",
    }
    settings = load_settings(CONFIG, environment)

    assert settings.access.keys["gateway"].key.get_secret_value() == SECRETS["schedule"]
    assert SECRETS["schedule"] not in settings.model_dump_json() + repr(settings)


def test_a_refused_request_is_counted() -> None:
    app = create_app(with_keys())

    call(app, "GET", "/strategies")
    call(app, "POST", "/nowhere", headers=READ)

    metrics = call(app, "GET", "/metrics", headers=READ).text
    assert 'kairos_refused_requests_total{status="401"} 1.0' in metrics
    assert 'kairos_refused_requests_total{status="403"} 1.0' in metrics
