"""What Alembic runs: the migrations, on the connection and in the transaction that `store/revisions.py` hands over."""

from alembic import context

from kairos.scheduler_core.service.store.tables import Table

if __name__ == "env_py":  # Alembic's name for this file; imported otherwise, it does nothing
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=Table.metadata,
        render_as_batch=True,  # SQLite cannot alter in place
    )
    context.run_migrations()
