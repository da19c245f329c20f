"""${message}: what changes, and what rows from before have instead."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = ${repr(up_revision)}, ${repr(down_revision)}


def upgrade() -> None:
    """Expand: releases of the revision before still run; a later revision takes theirs from served_revisions."""
    ${upgrades if upgrades else "raise NotImplementedError"}
    op.execute("INSERT INTO served_revisions VALUES ('${up_revision}')")


def downgrade() -> None:
    """The way back."""
    ${downgrades if downgrades else "raise NotImplementedError"}
    op.execute("DELETE FROM served_revisions WHERE revision = '${up_revision}'")
