"""Which form the database has, and how it gets the form that this Kairos needs.

Migrations first expand (new tables and columns beside the old ones), and contract a release later: a database serves
the release of its own revision and, while it is only expanded, the one before. `served_revisions` lists them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import select, text

from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import ServedRevision

SCRIPTS = "kairos:migrations"
"""Found as a package: in a checkout and in a wheel."""
_LOCK = 0x6B6169726F73
"""PostgreSQL's number for "a migration is running" ("kairos" in hexadecimal)."""


def head() -> str:
    """The newest revision, which this Kairos needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def current(store: Store) -> str | None:
    """The revision of the database; None: it is empty, or not there yet."""
    if not store.is_made:
        return None
    with store.read() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def upgrade(store: Store) -> None:
    """Bring the database to the newest revision.

    Raises:
        StoreError: it was made by a newer Kairos.
    """
    with migrating(store) as config:
        connection = config.attributes["connection"]
        found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in _known():
            raise StoreError(_newer(store, found))
        command.upgrade(config, "head")


@contextmanager
def migrating(store: Store) -> Iterator[Config]:
    """One transaction for Alembic's commands, one migrator at a time: another one waits for this one to end."""
    with store.write() as connection:  # SQLite: BEGIN IMMEDIATE is the lock
        if not store.embedded:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        config = _config()
        config.attributes["connection"] = connection
        yield config


def require_served(store: Store) -> None:
    """Pass a database that this Kairos can run on; an embedded one is upgraded first.

    Raises:
        StoreError: it has another form; the message says what to run.
    """
    ours, found = head(), current(store)
    if store.embedded and (found is None or found in _known()):
        if found != ours:
            upgrade(store)
        return
    if found == ours:
        return
    if found is None or found in _known():
        raise StoreError(
            f"the database {store.name} is at revision {found or 'none'}, this Kairos needs {ours}; "
            "run kairos db upgrade with the same configuration"
        )
    with store.read() as connection:
        served = set(connection.scalars(select(ServedRevision.revision)))
    if ours not in served:
        raise StoreError(_newer(store, found))


def _newer(store: Store, found: str) -> str:
    return (
        f"the database {store.name} is at revision {found}, made by a newer Kairos, this one needs {head()}; "
        "install that one or newer"
    )


def _known() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", SCRIPTS)
    config.set_main_option("path_separator", "os")
    return config
