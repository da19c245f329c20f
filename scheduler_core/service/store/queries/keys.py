"""Bearer keys: the database holds digests, and a key is seen once, by whom it is made for."""

import secrets
from datetime import UTC, datetime
from hashlib import sha256
from typing import NamedTuple, cast

from sqlalchemy import Connection, insert, select, update

from kairos.scheduler_core.config import Role
from kairos.scheduler_core.errors import ConflictError, UnknownNameError
from kairos.scheduler_core.service.store.changes import announce
from kairos.scheduler_core.service.store.tables import ApiKey

_RANDOM_BYTES = 32


class KeyRow(NamedTuple):
    """A key as it is kept."""

    name: str
    role: Role
    tenant: str | None
    digest: bytes
    created_at: datetime
    revoked_at: datetime | None


def digest_of(key: bytes) -> bytes:
    """What is kept of a key. Keys are random and long, so a plain hash cannot be guessed back."""
    return sha256(key).digest()


def add_key(connection: Connection, name: str, role: Role, tenant: str | None) -> str:
    """Make a key; nobody can read it again. The other replicas take it within a second or two.

    Raises:
        ConflictError: a key of this name is there, or was.
    """
    if connection.scalar(select(ApiKey.id).where(ApiKey.name == name)) is not None:
        raise ConflictError(f"there is a key '{name}' already, or was; take another name")
    key = f"kairos_{secrets.token_urlsafe(_RANDOM_BYTES)}"
    values = {"digest": digest_of(key.encode()), "role": role, "tenant": tenant, "created_at": datetime.now(UTC)}
    connection.execute(insert(ApiKey).values(name=name, **values))
    announce(connection, "keys")
    return key


def revoke_key(connection: Connection, name: str) -> None:
    """Take a key out of force; doing it again changes nothing.

    Raises:
        UnknownNameError: there is none of this name.
    """
    names = connection.scalars(select(ApiKey.name)).all()
    if name not in names:
        raise UnknownNameError("key", name, names)
    now = datetime.now(UTC)
    connection.execute(update(ApiKey).where(ApiKey.name == name, ApiKey.revoked_at.is_(None)).values(revoked_at=now))
    announce(connection, "keys")


def all_keys(connection: Connection) -> list[KeyRow]:
    """Every key, those that were revoked too, in the order they were made."""
    columns = (ApiKey.name, ApiKey.role, ApiKey.tenant, ApiKey.digest, ApiKey.created_at, ApiKey.revoked_at)
    rows = connection.execute(select(*columns).order_by(ApiKey.id))
    return [KeyRow(row.name, cast(Role, row.role), *row[2:]) for row in rows]
