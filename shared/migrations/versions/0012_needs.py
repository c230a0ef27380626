"""Jobs that wait for the models that other jobs make."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

HELD = "state IN ('running', 'canceling', 'pausing')"


def upgrade() -> None:
    op.alter_column("jobs", "queued_at", nullable=True)
    op.create_check_constraint(op.f("ck_jobs_in_line_before_held"), "jobs", f"queued_at IS NOT NULL OR NOT ({HELD})")
    op.create_index(
        "ix_jobs_needing", "jobs", ["id"], postgresql_where=sa.text("queued_at IS NULL AND completed_at IS NULL")
    )
    op.create_table(
        "needs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("field", sa.Text(), nullable=False),
        sa.Column("needs_job_id", sa.Uuid(), nullable=False),
        sa.Column("told", JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_needs_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "field", name=op.f("pk_needs")),
    )
    op.create_index("ix_needs_needs_job_id", "needs", ["needs_job_id"])


def downgrade() -> None:
    """Fails while jobs wait for others."""
    op.drop_table("needs")
    op.drop_index("ix_jobs_needing", "jobs")
    op.drop_constraint(op.f("ck_jobs_in_line_before_held"), "jobs", type_="check")
    op.execute("UPDATE jobs SET queued_at = created_at WHERE queued_at IS NULL AND completed_at IS NOT NULL")
    op.alter_column("jobs", "queued_at", nullable=False)
