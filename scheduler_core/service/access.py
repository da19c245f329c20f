"""Who may call what: bearer keys, their roles, and the one table of rules.

Without any key the service is open, and listens on loopback only. As soon as there is one, in the configuration or in
the database, every route but /healthz and /readyz needs a key, and that stays so when the last one is revoked.
"""

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from kairos.scheduler_core.config import ROLES, AccessSettings, Role, is_loopback
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.problems import problem_of, problem_response
from kairos.scheduler_core.service.schemas import Problem
from kairos.scheduler_core.service.store.queries.keys import all_keys, digest_of
from kairos.scheduler_core.service.store.session import Store

_CALLER = "kairos.caller"


class Rule(NamedTuple):
    """Which role the requests of some methods and paths need; None: no key."""

    methods: str
    path: str
    """A regular expression for all of it."""
    role: Role | None
    of_a_tenant: bool = False
    """Whether a key that is bound to a tenant may be used; the route keeps it to what is that tenant's."""


RULES = (
    Rule("POST", "/schedule", "schedule"),
    Rule("GET HEAD", "/(healthz|readyz)", None),
    Rule("GET HEAD", "/requests/.*", "read", of_a_tenant=True),
    Rule("GET HEAD", ".*", "read"),
    Rule("*", "/requests(/.*)?", "schedule", of_a_tenant=True),
    Rule("POST", "/(telemetry/.*|predict)", "schedule"),
    Rule("PUT", "/experiments/[^/]+/reports/[^/]+", "schedule"),
    Rule("*", ".*", "operate"),
)
"""The first that fits holds. A role may do what those before it in `ROLES` may."""

_RULES = [(set(rule.methods.split()), re.compile(rule.path, re.DOTALL), rule) for rule in RULES]
_RANKS = {role: rank for rank, role in enumerate(ROLES)}


def rule_for(method: str, path: str) -> Rule:
    """The rule that a request falls under."""
    for methods, pattern, rule in _RULES:
        if (method in methods or "*" in methods) and pattern.fullmatch(path):
            return rule
    raise AssertionError("the last rule fits everything")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose key came with a request."""

    name: str
    role: Role
    tenant: str | None


def tenant_of(scope: Scope) -> str | None:
    """The tenant that the caller is bound to; None: any."""
    caller: Caller | None = scope.get(_CALLER)
    return None if caller is None else caller.tenant


ByPrefix = dict[bytes, tuple[bytes, Caller]]
"""Digest and holder by the beginning of the digest: found at once, and told apart in constant time."""
_PREFIX_BYTES = 8


def _by_prefix(keys: Iterable[tuple[bytes, Caller]]) -> ByPrefix:
    return {digest[:_PREFIX_BYTES]: (digest, caller) for digest, caller in keys}


class Keys:
    """The keys in force: those of the configuration, and those of the database as it was last seen."""

    def __init__(self, configured: AccessSettings, store: Store | None) -> None:
        """Read them.

        Raises:
            StoreError: the database is away.
        """
        self._store = store
        self._stored: ByPrefix = {}
        self._any_stored = False
        self.configure(configured)
        self.look()

    @property
    def required(self) -> bool:
        """Whether requests need one."""
        return self._any_stored or bool(self._configured)

    def configure(self, settings: AccessSettings) -> None:
        """Take these keys of a configuration in place of the ones before."""
        self._configured = _by_prefix(
            (digest_of(key.key.get_secret_value().encode()), Caller(name, key.role, key.tenant))
            for name, key in settings.keys.items()
        )

    def look(self) -> None:
        """Take over what the database holds now.

        Raises:
            StoreError: it is away.
        """
        if self._store is None:
            return
        with self._store.read() as connection:
            rows = all_keys(connection)
        in_force = (row for row in rows if row.revoked_at is None)
        self._stored = _by_prefix((row.digest, Caller(row.name, row.role, row.tenant)) for row in in_force)
        self._any_stored = bool(rows)

    def find(self, key: bytes) -> Caller | None:
        """Whose key this is."""
        digest = digest_of(key)
        for keys in (self._configured, self._stored):
            known = keys.get(digest[:_PREFIX_BYTES])
            if known is not None and hmac.compare_digest(known[0], digest):
                return known[1]
        return None


class Access:
    """The ASGI middleware that lets requests through, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge a request by its key, method and path; nothing of it is read before."""
        refusal = self._refusal(scope) if scope["type"] == "http" and self._keys.required else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        self._metrics.refused.labels(str(refusal.status)).inc()
        headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else None
        await problem_response(refusal, headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Problem | None:
        rule = rule_for(scope["method"], scope["path"])
        if rule.role is None:
            return None
        caller = self._caller(scope)
        if caller is None:
            return problem_of(401, "this service needs a key: send the header 'Authorization: Bearer KEY'")
        scope[_CALLER] = caller
        if _RANKS[caller.role] < _RANKS[rule.role]:
            return problem_of(403, f"the key '{caller.name}' has the role {caller.role}; this needs {rule.role}")
        if caller.tenant is not None and not rule.of_a_tenant:
            return problem_of(
                403, f"the key '{caller.name}' is for requests of its tenant only; see docs/operations.md"
            )
        return None

    def _caller(self, scope: Scope) -> Caller | None:
        for name, value in scope["headers"]:
            if name == b"authorization":
                kind, _, key = value.partition(b" ")
                return self._keys.find(key.strip()) if kind.lower() == b"bearer" else None
        return None


def require_loopback(host: str) -> None:
    """Pass an address that only this machine can reach.

    Raises:
        ConfigError: others can, and there are no keys to tell them apart.
    """
    if not is_loopback(host):
        raise ConfigError(
            f"host '{host}' is open to other machines, and the service has no keys; "
            "use 127.0.0.1, or make a key with kairos keys add"
        )
