"""Aliases of model versions with their history, and the scope of the keys that may move them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NOW = sa.text("clock_timestamp()")
EMPTY = sa.text("'[]'::jsonb")


def upgrade() -> None:
    op.create_table(
        "model_aliases",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Uuid(), nullable=False),
        sa.Column("gate", postgresql.JSONB(), server_default=EMPTY, nullable=False),
        sa.Column("move_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_model_aliases_model_id")),
        # A version cannot be deleted while a name stands for it.
        sa.ForeignKeyConstraint(["version_id"], ["model_versions.id"], name=op.f("fk_model_aliases_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_aliases")),
        sa.UniqueConstraint("model_id", "name", name=op.f("uq_model_aliases_model_id_name")),
    )
    op.create_index("ix_model_aliases_version_id", "model_aliases", ["version_id"])
    op.create_table(
        "alias_moves",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("from_version", sa.Integer(), nullable=True),
        sa.Column("to_version", sa.Integer(), nullable=True),
        sa.Column("gate", postgresql.JSONB(), server_default=EMPTY, nullable=False),
        sa.Column("checks", postgresql.JSONB(), server_default=EMPTY, nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.CheckConstraint(
            "from_version IS NOT NULL OR to_version IS NOT NULL", name=op.f("ck_alias_moves_says_something")
        ),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_alias_moves_model_id")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_alias_moves_key_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alias_moves")),
    )
    op.create_index("ix_alias_moves_history", "alias_moves", ["model_id", "alias", sa.text("id DESC")])
    op.create_index(
        "ix_jobs_evaluations",
        "jobs",
        [sa.text("(inputs ->> 'version_id')")],
        postgresql_where=sa.text("type = 'evaluate'"),
    )
    # Who may train adds versions already; so far nobody could be given less.
    op.execute(
        "UPDATE api_keys SET scopes = array_append(scopes, 'models:write')"
        " WHERE scopes @> ARRAY['jobs:write', 'models:read'] AND NOT scopes @> ARRAY['models:write']"
    )


def downgrade() -> None:
    op.execute("UPDATE api_keys SET scopes = array_remove(scopes, 'models:write')")
    op.drop_index("ix_jobs_evaluations", "jobs")
    op.drop_table("alias_moves")
    op.drop_table("model_aliases")
