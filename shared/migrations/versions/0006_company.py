"""Jobs that share a device: what may join, and who must stay alone."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

MAY_JOIN = sa.text("state = 'queued' AND type = 'generate' AND NOT alone")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("alone", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_index(
        "ix_jobs_company",
        "jobs",
        [sa.text("(inputs ->> 'version_id')"), "tenant_id", "queue", "priority", "queued_at", "id"],
        postgresql_where=MAY_JOIN,
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_company", "jobs", postgresql_where=MAY_JOIN)
    op.drop_column("jobs", "alone")
