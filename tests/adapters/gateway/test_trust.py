"""Who may ask for what, and that nothing of a prompt, an output or a key goes where it does not belong."""

import json
import logging
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from emulated import MODEL, call, options, run, workers
from gateways import KINDS, behind_gateway, running_gateway, settings_for

from kairos.adapters.asgi import answer, body_of
from kairos.adapters.asgi_server import AsgiServer
from kairos.adapters.emulator.faults import Fault
from kairos.adapters.gateway.bodies import Body
from kairos.adapters.gateway.calls import Call
from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.trust import Trust
from kairos.adapters.http_client import HttpPool, UpstreamError
from kairos.scheduler_core.config import GatewaySettings, SloSettings

COMPLETION = {"model": MODEL, "prompt": "x" * 40, "max_tokens": 2}
KEYS = [{"key": "secret-a", "tenant": "acme", "classes": ["batch"]}, {"key": "secret-b", "tenant": "b"}]
SLO = {"classes": {"default": {"ttft_s": 2.0, "tpot_s": 0.05}, "batch": {"ttft_s": 30.0, "tpot_s": None}}}


def bearer(key: str) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + key.encode()


def test_without_a_known_key_nothing_is_served() -> None:
    async def work() -> list[int]:
        async with behind_gateway(options(), gateway={"keys": KEYS}, slo=SLO) as (gateway, _):
            address = gateway.server.address
            asked = [(), (bearer("wrong"),), (bearer("secret-b"),)]
            statuses = [(await call(address, "/v1/completions", COMPLETION, headers))[0] for headers in asked]
            return [*statuses, (await call(address, "/v1/models"))[0], (await call(address, "/v1/embeddings", {}))[0]]

    assert run(work()) == [401, 401, 200, 401, 401]


def told_targets(headers: dict[bytes, bytes], *, client: str = "10.0.0.1", **gateway: Any) -> Call:
    """A call after the gateway has read these headers."""
    settings = GatewaySettings.model_validate({"keys": KEYS} | gateway)
    trust = Trust(settings, SloSettings.model_validate(SLO))
    body = Body(json.dumps(COMPLETION).encode())
    made = Call(1, "r", b"/v1/completions", False, body, body.text(False), 0.0)
    trust.set_targets(made, trust.identify(headers, client), headers)
    return made


A, B = dict([bearer("secret-a")]), dict([bearer("secret-b")])


def test_tenant_and_class_come_from_the_key_and_headers_choose_within_it() -> None:
    first, second = told_targets(A), told_targets(B | {b"x-kairos-class": b"batch", b"x-kairos-tenant": b"other"})

    assert (first.tenant, first.slo_class, first.ttft_target_s) == ("acme", "batch", 30.0)
    assert (second.tenant, second.slo_class, second.tpot_target_s) == ("b", "batch", float("inf"))


@pytest.mark.parametrize(("header", "code"), [(b"default", "class_not_allowed"), (b"gold", "unknown_class")])
def test_a_class_that_a_key_may_not_use_is_refused(header: bytes, code: str) -> None:
    with pytest.raises(CallError) as refused:
        told_targets(A | {b"x-kairos-class": header})

    assert refused.value.code == code


@pytest.mark.parametrize(
    ("header", "value", "ttft_s", "tpot_s"),
    [
        (b"x-kairos-ttft-s", b"5", 5.0, 0.05),
        (b"x-kairos-ttft-s", b"0.5", 2.0, 0.05),
        (b"x-slo-ttft-ms", b"5000", 5.0, 0.05),
        (b"x-llm-d-slo-tpot-ms", b"80", 2.0, 0.08),
        (b"x-dynamo-slo-ttft-ms", b"4000", 4.0, 0.05),
        (b"x-sgl-ttft-slo-ms", b"4000", 4.0, 0.05),
    ],
)
def test_targets_may_be_looser_than_the_class_not_tighter(
    header: bytes, value: bytes, ttft_s: float, tpot_s: float
) -> None:
    made = told_targets(B | {header: value})

    assert (made.ttft_target_s, made.tpot_target_s) == pytest.approx((ttft_s, tpot_s))


@pytest.mark.parametrize("value", [b"soon", b"0", b"-1", b"nan", b"inf"])
def test_a_target_that_is_no_number_above_0_is_refused(value: bytes) -> None:
    with pytest.raises(CallError, match="x-kairos-ttft-s"):
        told_targets(B | {b"x-kairos-ttft-s": value})


def test_a_trusted_proxy_speaks_for_tenants() -> None:
    headers = A | {b"x-kairos-tenant": b"other", b"x-kairos-class": b"default"}

    made = told_targets(headers, trusted_proxies=["10.0.0.0/8"])

    assert (made.tenant, made.slo_class) == ("other", "default")


def test_an_address_that_others_reach_needs_keys() -> None:
    with pytest.raises(ValueError, match="give keys"):
        GatewaySettings(host="0.0.0.0")


# -- what reaches whom


def test_engines_get_their_own_key_and_nothing_that_was_between_client_and_gateway() -> None:
    seen: list[tuple[dict[bytes, bytes], Any]] = []

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if scope["method"] == "GET":
            await answer(send, 200, b'{"version": "0.32.0"}')
            return
        seen.append((headers, json.loads(await body_of(receive))))
        await answer(send, 200, b'{"choices": [], "usage": {"prompt_tokens": 10}}', extra=[(b"set-cookie", b"a=b")])

    private = {"kv_transfer_params": "boom", "bootstrap_room": 1, "priority": -5, "request_id": "x", "rid": "x"}
    headers = (
        bearer("secret-b"),
        (b"content-type", b"application/json"),
        (b"cookie", b"session=1"),
        (b"x-override-priority", b"9"),
        (b"x-prefiller-host-port", b"evil:1"),
        (b"x-data-parallel-rank", b"3"),
        (b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),
        (b"x-request-id", b"mine"),
    )

    async def work() -> list[tuple[int, bytes]]:
        server = AsgiServer(engine)
        await server.start()
        fleet = {"mixed": [{"profile": "p", "url": server.address, "key": "engine-key"}]}
        async with running_gateway(settings_for(fleet, {"keys": KEYS}, slo=SLO)) as gateway:
            address = gateway.server.address
            body = COMPLETION | private
            done = [await call(address, path, body, headers) for path in ("/v1/completions", "/v1/embeddings")]
        await server.stop()
        return done

    answers = run(work())
    (ordered, body), (relayed, _) = seen

    assert [status for status, _ in answers] == [200, 200]
    assert body == COMPLETION
    for got in (ordered, relayed):
        assert got[b"authorization"] == b"Bearer engine-key"
        assert not got.keys() & {b"cookie", b"x-override-priority", b"x-prefiller-host-port", b"x-data-parallel-rank"}
    assert ordered[b"x-request-id"] == b"mine"
    assert ordered[b"traceparent"].startswith(b"00-" + b"a" * 32)
    assert ordered[b"traceparent"] != headers[6][1]


def test_an_engine_that_refuses_the_gateways_key_is_not_the_clients_fault() -> None:
    async def engine(scope: Any, receive: Any, send: Any) -> None:
        ok = scope["method"] == "GET"
        await answer(send, 200 if ok else 401, b'{"version": "0.32.0"}' if ok else b'{"error": "engine-key is wrong"}')

    async def work() -> list[tuple[int, bytes]]:
        server = AsgiServer(engine)
        await server.start()
        async with running_gateway(settings_for({"mixed": [{"profile": "p", "url": server.address}]})) as gateway:
            paths = ("/v1/completions", "/v1/embeddings")
            done = [await call(gateway.server.address, path, COMPLETION) for path in paths]
        await server.stop()
        return done

    answers = run(work())

    assert [status for status, _ in answers] == [502, 502]
    assert all(b"engine-key" not in body and json.loads(body)["error"]["code"] == "engine_key" for _, body in answers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_found_nowhere_but_at_the_engine(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A marker through every route and fault: not in the log, the metrics, the health page or an error."""
    marker = "zebra-in-the-prompt"
    caplog.set_level(logging.DEBUG)
    quick = {"timeouts": {"first_token_s": 0.2, "idle_s": 0.2, "total_s": 0.5, "connect_s": 0.5}}

    async def work() -> list[bytes]:
        told: list[bytes] = []
        async with behind_gateway(*KINDS[kind], gateway=quick) as (gateway, running):
            address = gateway.server.address
            chat = {"model": MODEL, "messages": [{"role": "user", "content": marker}], "max_tokens": 2}
            bodies = [COMPLETION | {"prompt": marker}, COMPLETION | {"prompt": marker, "stream": True}]
            wrong = [b'{"model": "tiny", "prompt": "' + marker.encode(), {"model": MODEL, "prompt": {marker: 1}}]
            for fault in (None, *Fault):
                for worker in running:
                    worker.faults.set({} if fault is None else {fault: 1.0})
                for body in (*bodies, *wrong):
                    told.append((await call(address, "/v1/completions", body))[1])
                told.append((await call(address, "/v1/chat/completions", chat))[1])
                told.append((await call(address, "/v1/embeddings", {"model": MODEL, "input": marker}))[1])
                told.append((await call(address, "/generate", {"text": marker, "sampling_params": {marker: 1}}))[1])
                told.append((await call(address, "/generate", {"text": {marker: 1}}))[1])
            told += [(await call(address, path))[1] for path in ("/metrics", "/health", "/v1/models")]
        return told

    told = run(work(), limit_s=60)

    assert marker not in caplog.text
    assert all(marker.encode() not in body for body in told)


# -- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "cert.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-out", made[0], "-keyout", made[1]], check=True, capture_output=True)
    return made


def test_tls_to_clients_and_to_engines(certificate: tuple[Path, Path]) -> None:
    async def work() -> tuple[int, str]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        async with workers(options()) as [worker]:
            front = AsgiServer(worker, tls=context)
            await front.start()
            gateway_settings = {
                "tls": {"certificate": str(certificate[0]), "key": str(certificate[1])},
                "engine_ca": str(certificate[0]),
            }
            fleet = {"mixed": [{"profile": "p", "url": front.address}]}
            async with running_gateway(settings_for(fleet, gateway_settings)) as gateway:
                await gateway.reload(settings_for(fleet, gateway_settings))
                pool = HttpPool(gateway.server.address, tls=ssl.create_default_context(cafile=str(certificate[0])))
                got = await pool.send(b"POST", b"/v1/completions", (), json.dumps(COMPLETION).encode())
                await got.body()
                pool.close()
                stranger = HttpPool(gateway.server.address)
                try:
                    await stranger.send(b"GET", b"/health")
                except UpstreamError as problem:
                    refused = problem.kind
            await front.stop()
            return got.status, refused

    assert run(work()) == (200, "connect")
