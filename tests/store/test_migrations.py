"""Every way between an empty database and head, on both kinds, and who may run on what."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from command_line import kairos
from sqlalchemy import inspect, text

from kairos.scheduler_core.errors import ConfigError, StoreError
from kairos.scheduler_core.service.store import revisions
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Table

ROOT = Path(__file__).parents[2]


def tables(store: Store) -> set[str]:
    with store.read() as connection:
        return set(inspect(connection).get_table_names())


def differences(store: Store) -> list[object]:
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, Table.metadata))


def test_empty_to_head_to_base_to_head(empty: Store) -> None:
    revisions.upgrade(empty)
    at_head = tables(empty)
    with revisions.migrating(empty) as config:
        command.downgrade(config, "base")
    at_base = tables(empty)
    revisions.upgrade(empty)

    assert at_head == tables(empty) == {*Table.metadata.tables, "alembic_version"}
    assert at_base == {"alembic_version"}
    assert revisions.current(empty) == revisions.head()


def test_the_models_are_what_the_migrations_make(store: Store) -> None:
    assert differences(store) == []


def test_a_difference_between_models_and_migrations_would_be_noticed(store: Store) -> None:
    with store.write() as connection:
        connection.execute(text("ALTER TABLE steps ADD COLUMN colour INTEGER"))
        connection.execute(text("DROP TABLE activations"))

    assert len(differences(store)) == 2


@pytest.mark.parametrize(
    ("command", "code", "told"), [(["current"], 0, "empty, this Kairos needs"), (["forget", "--all"], 2, "is empty")]
)
def test_looking_at_a_database_that_is_not_there_does_not_make_it(
    tmp_path: Path, command: list[str], code: int, told: str
) -> None:
    ended = kairos("db", *command, "--url", f"sqlite:///{tmp_path}/nowhere.db")

    assert (ended.code, told in ended.stdout + ended.stderr) == (code, True)
    assert list(tmp_path.iterdir()) == []


def test_of_two_migrations_at_once_one_waits(empty: Store, url: str) -> None:
    begun = Event()

    def second() -> str | None:
        other = Store(url)
        begun.set()
        revisions.upgrade(other)  # would fail with "table exists" if it did not wait for the first to end
        found = revisions.current(other)
        other.close()
        return found

    with ThreadPoolExecutor(1) as pool:
        with revisions.migrating(empty) as config:
            waiting = pool.submit(second)
            assert begun.wait(5)
            command.upgrade(config, "head")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)

        assert waiting.result(timeout=20) == revisions.head()


def test_a_migration_that_fails_leaves_the_database_as_it_was(empty: Store) -> None:
    def migrate_and_fail() -> None:
        with revisions.migrating(empty) as config:
            command.upgrade(config, "head")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate_and_fail()

    assert tables(empty) == set()


def test_an_embedded_database_upgrades_itself_and_others_are_refused_with_what_to_run(empty: Store) -> None:
    if empty.embedded:
        revisions.require_served(empty)
        assert revisions.current(empty) == revisions.head()
    else:
        with pytest.raises(
            StoreError, match=rf"at revision none, this Kairos needs {revisions.head()}; run kairos db upgrade"
        ):
            revisions.require_served(empty)
        assert tables(empty) == set()


def moved_on(store: Store, *, served: list[str]) -> None:
    """The database as a newer release would leave it."""
    with store.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        connection.execute(text("DELETE FROM served_revisions"))
        for revision in served:
            connection.execute(text("INSERT INTO served_revisions VALUES (:revision)"), {"revision": revision})


def test_a_database_that_the_next_release_expanded_still_serves(store: Store) -> None:
    moved_on(store, served=[revisions.head(), "9999"])

    revisions.require_served(store)

    assert revisions.current(store) == "9999"


def test_a_database_that_a_later_release_contracted_is_refused_and_never_touched(store: Store) -> None:
    moved_on(store, served=["9999"])

    with pytest.raises(StoreError, match="at revision 9999, made by a newer Kairos"):
        revisions.require_served(store)
    with pytest.raises(StoreError, match="at revision 9999, made by a newer Kairos"):
        revisions.upgrade(store)


def test_the_head_serves_itself(store: Store) -> None:
    with store.read() as connection:
        served = connection.execute(text("SELECT revision FROM served_revisions")).scalars().all()

    assert revisions.head() in served


def test_the_scripts_are_found_as_a_package_and_stand_by_themselves() -> None:
    scripts = ScriptDirectory.from_config(Config(toml_file=ROOT / "pyproject.toml"))

    assert scripts.get_current_head() == revisions.head()
    for path in (ROOT / "migrations" / "versions").glob("*.py"):
        assert "kairos" not in path.read_text(), f"{path} must not import what moves on"


def test_a_new_revision_is_made_from_the_template(tmp_path: Path) -> None:
    config = Config(toml_file=ROOT / "pyproject.toml")
    config.set_main_option("version_locations", str(tmp_path))
    config.set_main_option("path_separator", "newline")
    command.revision(config, "one column more", rev_id="0001")

    made = (tmp_path / "0001_one_column_more.py").read_text()
    compile(made, "0001", "exec")
    assert made.startswith('"""one column more')


def test_the_commands_upgrade_say_where_the_database_is_and_repeat(url: str) -> None:
    head = revisions.head()
    before = kairos("db", "current", "--url", url)
    first = kairos("db", "upgrade", "--url", url)
    again = kairos("db", "upgrade", "--url", url)
    after = kairos("db", "current", "--url", url, "--json")

    assert (before.code, first.code, again.code, after.code) == (0, 0, 0, 0)
    assert f"empty, this Kairos needs {head}" in before.stdout
    assert first.stdout.endswith(f"empty -> {head}\n")
    assert again.stdout.endswith(f"{head} -> {head}\n")
    assert f'"current": "{head}", "head": "{head}"' in after.stdout


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("nonsense", "store.url is no database address"),
        ("mysql://root:geheim@localhost/x", "store.url is of the kind 'mysql'"),
        ("sqlite://", "store.url names no file"),
        ("sqlite:///:memory:", "store.url names no file"),
        ("sqlite:////no/such/folder/kairos.db", "there is no folder /no/such/folder"),
    ],
)
def test_an_address_that_cannot_be_is_one_line_without_its_password(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Store(address)
    ended = kairos("db", "upgrade", "--url", address)

    assert ended.code == 2
    assert says in ended.stderr
    assert "geheim" not in ended.stderr


def test_a_database_that_is_away_is_one_line_without_its_password() -> None:
    ended = kairos("db", "current", "--url", "postgresql://someone:geheim@127.0.0.1:1/kairos")

    assert ended.code == 1
    assert ended.stderr.startswith("kairos: the database postgresql+psycopg://someone:***@127.0.0.1:1/kairos cannot be")
    assert "geheim" not in ended.stderr


def test_without_a_database_the_commands_say_how_to_name_one() -> None:
    ended = kairos("db", "upgrade")

    assert (ended.code, ended.stderr) == (
        2,
        "kairos: no database is named; give --config FILE, --url or KAIROS_STORE__URL\n",
    )
    assert "has no store; add store:" in kairos("db", "current", "--config", ROOT / "examples" / "kairos.yaml").stderr
