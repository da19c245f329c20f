"""`kairos db upgrade | current | forget | expire`: the database of the control plane."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kairos.scheduler_core.errors import ConfigError

if TYPE_CHECKING:
    from kairos.scheduler_core.service.store.session import Store

Config = Annotated[Path | None, typer.Option(help="A kairos.yaml with a store.")]
Url = Annotated[
    str | None,
    typer.Option(help="sqlite:///PATH or postgresql://USER@HOST/NAME, instead of a file.", envvar="KAIROS_STORE__URL"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def register(app: typer.Typer) -> None:
    """Add `db` and its commands."""
    db = typer.Typer(no_args_is_help=True, help="The database: its form, and what it forgets.")
    db.command()(upgrade)
    db.command()(current)
    db.command()(forget)
    db.command()(expire)
    app.add_typer(db, name="db")


def upgrade(config: Config = None, url: Url = None) -> None:
    """Bring the database to the form that this Kairos needs; while another one does, this waits.

    Example: kairos db upgrade --config kairos.yaml
    """
    from kairos.scheduler_core.service.store import revisions

    with opened(config, url) as store:
        before = revisions.current(store)
        revisions.upgrade(store)
        typer.echo(f"{store.name}: {before or 'empty'} -> {revisions.head()}")


def current(config: Config = None, url: Url = None, as_json: Json = False) -> None:
    """Print the revision of the database, and the one that this Kairos needs.

    Example: kairos db current --config kairos.yaml
    """
    from kairos.scheduler_core.service.store import revisions

    with opened(config, url) as store:
        found, needed = revisions.current(store), revisions.head()
        if as_json:
            typer.echo(json.dumps({"database": store.name, "current": found, "head": needed}))
        else:
            typer.echo(f"{store.name}: {found or 'empty'}, this Kairos needs {needed}")


def forget(
    config: Config = None,
    url: Url = None,
    tenant: Annotated[list[str] | None, typer.Option(help="Forget the ids of this tenant's requests.")] = None,
    request: Annotated[list[str] | None, typer.Option(help="Forget the ids of this request.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Forget all tenant and request ids.")] = False,
) -> None:
    """Delete tenant and request ids; lengths and times stay.

    Example: kairos db forget --config kairos.yaml --tenant acme
    """
    from kairos.scheduler_core.service.store.queries.telemetry import forget as forget_requests

    if not (tenant or request or everyone):
        raise ConfigError("nothing is named to be forgotten; give --tenant, --request or --all")
    with opened(config, url) as store:
        require_filled(store)
        rows = forget_requests(store, tenants=tenant or (), requests=request or (), everyone=everyone)
        typer.echo(f"{store.name}: {rows} requests are of nobody now")


def expire(config: Config = None, url: Url = None, as_json: Json = False) -> None:
    """Delete what is older than `store.retention` says; the service does the same every hour.

    Example: kairos db expire --config kairos.yaml
    """
    from kairos.scheduler_core.config import Retention
    from kairos.scheduler_core.config_file import load_settings
    from kairos.scheduler_core.service.store.queries.retention import expiring

    settings = load_settings(config).store if config else None
    gone: Counter[str] = Counter()
    with opened(config, url) as store:
        require_filled(store)
        for table, rows in expiring(store, settings.retention if settings else Retention(), datetime.now(UTC)):
            gone[table] += rows
        if as_json:
            typer.echo(json.dumps(gone))
        else:
            told = ", ".join(f"{rows} of {table}" for table, rows in gone.items() if rows)
            typer.echo(f"{store.name}: {told or 'nothing'} deleted")


def require_filled(store: "Store") -> None:
    """Pass a database that has something in it and that this Kairos runs on.

    Raises:
        ConfigError: there is nothing: most likely it is another one that is meant.
        StoreError: it is away, or not at a revision that this Kairos runs on.
    """
    from kairos.scheduler_core.service.store import revisions

    if revisions.current(store) is None:
        raise ConfigError(f"{store.name} is empty; check the address")
    revisions.require_served(store)


@contextmanager
def opened(config: Path | None, url: str | None) -> "Iterator[Store]":
    """The database of an address or of a configuration.

    Raises:
        ConfigError: neither is given, or the configuration has none.
    """
    from kairos.scheduler_core.config_file import load_settings
    from kairos.scheduler_core.service.store.session import Store

    if url is None:
        if config is None:
            raise ConfigError("no database is named; give --config FILE, --url or KAIROS_STORE__URL")
        settings = load_settings(config)
        if settings.store is None:
            raise ConfigError(f"{config} has no store; add store: {{url: sqlite:///PATH}}")
        url = settings.store.url.get_secret_value()
    store = Store(url)
    try:
        yield store
    finally:
        store.close()
