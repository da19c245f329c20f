"""`kairos keys add | list | revoke`: who may call the control plane."""

import json
from typing import Annotated

import typer

from kairos.adapters.cli.db import Config, Json, Url, opened
from kairos.scheduler_core.errors import ConfigError

Name = Annotated[str, typer.Argument(help="Of the key: who holds it.")]


def register(app: typer.Typer) -> None:
    """Add `keys` and its commands."""
    keys = typer.Typer(no_args_is_help=True, help="Bearer keys of the service.")
    keys.command()(add)
    keys.command("list")(list_keys)
    keys.command()(revoke)
    app.add_typer(keys, name="keys")


def add(
    name: Name,
    role: Annotated[str, typer.Option(help="read, schedule (and read) or operate (everything).")],
    tenant: Annotated[str | None, typer.Option(help="Bind it to the requests of one tenant.")] = None,
    config: Config = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it: this once, since only its digest is kept.

    Example: kairos keys add gateway-1 --role schedule --config kairos.yaml
    """
    from kairos.scheduler_core.config import ROLES
    from kairos.scheduler_core.service.store import revisions
    from kairos.scheduler_core.service.store.queries.keys import add_key

    known = next((known for known in ROLES if known == role), None)
    if known is None:
        raise ConfigError(f"--role is '{role}'; use {', '.join(ROLES)}")
    for what, value, most in (("a name", name, 128), ("--tenant", tenant or "-", 256)):
        if not value.isprintable() or not 1 <= len(value) <= most:
            raise ConfigError(f"{what} needs 1 to {most} printable characters")
    with opened(config, url) as store:
        revisions.require_served(store)
        with store.write() as connection:
            key = add_key(connection, name, known, tenant)
    typer.echo(json.dumps({"name": name, "role": role, "tenant": tenant, "key": key}) if as_json else key)


def list_keys(config: Config = None, url: Url = None, as_json: Json = False) -> None:
    """List the keys, without what only their holders know.

    Example: kairos keys list --config kairos.yaml
    """
    from kairos.scheduler_core.service.store import revisions
    from kairos.scheduler_core.service.store.queries.keys import all_keys

    with opened(config, url) as store:
        revisions.require_served(store)
        with store.read() as connection:
            rows = all_keys(connection)
    shown = [
        {
            "name": row.name,
            "role": row.role,
            "tenant": row.tenant,
            "created_at": f"{row.created_at:%Y-%m-%dT%H:%M:%SZ}",
            "revoked_at": f"{row.revoked_at:%Y-%m-%dT%H:%M:%SZ}" if row.revoked_at else None,
        }
        for row in rows
    ]
    if as_json:
        typer.echo(json.dumps(shown))
        return
    for key in shown:
        state = f"revoked {key['revoked_at']}" if key["revoked_at"] else "in force"
        bound = f" for tenant {key['tenant']}" if key["tenant"] else ""
        typer.echo(f"{key['name']}: {key['role']}{bound}, made {key['created_at']}, {state}")
    if not shown:
        typer.echo("no keys; the service listens on loopback only")


def revoke(name: Name, config: Config = None, url: Url = None) -> None:
    """Take a key out of force; every replica refuses it within two seconds.

    Example: kairos keys revoke gateway-1 --config kairos.yaml
    """
    from kairos.scheduler_core.service.store import revisions
    from kairos.scheduler_core.service.store.queries.keys import revoke_key

    with opened(config, url) as store:
        revisions.require_served(store)
        with store.write() as connection:
            revoke_key(connection, name)
        typer.echo(f"{store.name}: '{name}' is revoked")
