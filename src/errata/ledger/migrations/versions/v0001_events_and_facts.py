"""Events and facts: the first version of the tables."""

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "events",
        sql.Column("number", sql.Integer, primary_key=True),
        sql.Column("id", sql.String(64), nullable=False, unique=True),
        sql.Column("previous", sql.String(64), nullable=False, unique=True),
        sql.Column("kind", sql.String(16), nullable=False),
        sql.Column("edit", sql.String(64), nullable=False),
        sql.Column("content", sql.Text, nullable=False),
    )
    op.create_index("ix_events_edit", "events", ["edit"])
    op.create_table(
        "facts",
        sql.Column("edit", sql.String(64), primary_key=True),
        sql.Column("request", sql.Integer, primary_key=True),
        sql.Column("fact", sql.String(64), nullable=False),
        sql.Column("subject", sql.String(64), nullable=False),
    )
    op.create_index("ix_facts_fact", "facts", ["fact"])
    op.create_index("ix_facts_subject", "facts", ["subject"])


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("facts")
    op.drop_table("events")
