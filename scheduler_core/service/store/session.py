"""Opens the database: SQLite in a file, or PostgreSQL, which replicas share.

SQLite runs in WAL mode with synchronous=FULL: what was committed survives the end of the process and a loss of power.
WAL needs memory shared between processes, so the file must not lie on a network file system. Every write takes the
write lock at its beginning (BEGIN IMMEDIATE), so that no transaction fails half-way because another one was faster.
PostgreSQL keeps what was committed as its own synchronous_commit says (by default: flushed to disk).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from kairos.scheduler_core.errors import ConfigError, StoreError

BUSY_TIMEOUT_S = 30
"""How long a transaction waits for another writer (SQLite) or for a free connection before it gives up."""
CONNECT_TIMEOUT_S = 5
"""How long PostgreSQL may take to answer at all."""


class Store:
    """An open database. Transactions are short: `with store.write() as connection`, committed at its end."""

    def __init__(self, url: str) -> None:
        """Open it; nothing is read yet.

        Raises:
            ConfigError: an address of another kind, or an SQLite file that cannot be there.
        """
        address = _address(url)
        self.embedded = address.get_backend_name() == "sqlite"
        common: dict[str, Any] = {"pool_timeout": BUSY_TIMEOUT_S, "hide_parameters": True}  # no id in a log
        if self.embedded:
            waits = {"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
            self.engine = create_engine(address, connect_args=waits, **common)
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            waits = {"connect_timeout": CONNECT_TIMEOUT_S}
            self.engine = create_engine(address, connect_args=waits, pool_pre_ping=True, **common)
        self._writing = self.engine.execution_options(writes=True)
        self._driver_error: type[Exception] = self.engine.dialect.loaded_dbapi.Error
        self.name = address.render_as_string(hide_password=True)
        """Its address, as it may be shown."""
        self._file = Path(address.database or "") if self.embedded else None

    @property
    def is_made(self) -> bool:
        """Whether there is a database to read from; looking does not make SQLite's file."""
        return self._file is None or self._file.exists()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes: all of it, once this ends without an error, or nothing.

        Raises:
            StoreError: the database is away or full, or waited too long for another writer.
        """
        with self._told(), self._writing.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that reads one state of the database.

        Raises:
            StoreError: the database is away.
        """
        with self._told(), self.engine.begin() as connection:
            yield connection

    def is_there(self) -> bool:
        """Whether the database answers."""
        try:
            with self.read() as connection:
                connection.execute(text("SELECT 1"))
        except StoreError:
            return False
        return True

    @contextmanager
    def listening(self, channel: str) -> "Iterator[psycopg.Connection[Any]]":
        """PostgreSQL: a connection of its own that hears what is notified on a channel.

        Raises:
            StoreError: the database is away.
        """
        with self._told():
            address = self.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
            connection = psycopg.connect(address, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)
        try:
            connection.execute(f"LISTEN {channel}".encode())
            yield connection
        finally:
            connection.close()

    def shrink_log(self) -> None:
        """SQLite: write its log into the file and empty it, so that what was overwritten is in neither."""
        if self.embedded:
            with self._told(), self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Let go of the connections."""
        self.engine.dispose()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the driver says in words of ours; what breaks the rules of a table stays a bug."""
        try:
            yield
        except (IntegrityError, DataError):
            raise
        except (DBAPIError, PoolTimeout, self._driver_error) as error:
            reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
            raise StoreError(f"the database {self.name} cannot be used: {reason}; nothing was written") from error


def _address(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError:
        raise ConfigError(
            "store.url is no database address; give sqlite:///PATH or postgresql://USER@HOST/NAME"
        ) from None
    kind = address.get_backend_name()
    if kind == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise ConfigError(f"store.url is of the kind '{kind}'; give sqlite:///PATH or postgresql://USER@HOST/NAME")
    if not address.database or address.database == ":memory:":
        raise ConfigError("store.url names no file; give sqlite:///PATH, with four slashes for an absolute path")
    folder = Path(address.database).absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"store.url: there is no folder {folder} for the database; make it first")
    return address.set(drivername="sqlite")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver would begin transactions itself, and never IMMEDIATE
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
