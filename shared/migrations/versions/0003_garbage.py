"""What housekeeping has to remember, and the indexes by which it finds its work."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UNDATED = sa.text("expires_at IS NULL AND removed_at IS NULL")
EXPIRING = sa.text("expires_at IS NOT NULL AND removed_at IS NULL")
REMOVED = sa.text("removed_at IS NOT NULL AND deleted_at IS NULL")
WHOLE_LOG = sa.text("completed_at IS NOT NULL AND log_pruned_at IS NULL")
RETRY_WAITS = sa.text("retry_of IS NOT NULL AND completed_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "garbage",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("found_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_garbage")),
    )

    op.add_column("jobs", sa.Column("log_pruned_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_jobs_whole_log", "jobs", ["completed_at"], postgresql_where=WHOLE_LOG)
    op.create_index("ix_jobs_unended_retries", "jobs", ["id"], postgresql_where=RETRY_WAITS)

    op.add_column("artifacts", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.create_check_constraint(
        op.f("ck_artifacts_deleted_when_removed"), "artifacts", "deleted_at IS NULL OR removed_at IS NOT NULL"
    )
    op.create_index("ix_artifacts_undated", "artifacts", ["kind", "job_id"], postgresql_where=UNDATED)
    op.create_index("ix_artifacts_expiring", "artifacts", ["expires_at"], postgresql_where=EXPIRING)
    op.create_index("ix_artifacts_removed", "artifacts", ["removed_at"], postgresql_where=REMOVED)

    op.create_index("ix_model_versions_weights", "model_versions", [sa.text("(weights ->> 'key')")])
    op.create_index("ix_datasets_source", "datasets", [sa.text("(source ->> 'key')")])
    op.create_index("ix_datasets_job", "datasets", ["job_id"])


def downgrade() -> None:
    op.drop_index("ix_datasets_job", "datasets")
    op.drop_index("ix_datasets_source", "datasets")
    op.drop_index("ix_model_versions_weights", "model_versions")
    op.drop_index("ix_artifacts_removed", "artifacts")
    op.drop_index("ix_artifacts_expiring", "artifacts")
    op.drop_index("ix_artifacts_undated", "artifacts")
    op.drop_constraint(op.f("ck_artifacts_deleted_when_removed"), "artifacts")
    op.drop_column("artifacts", "deleted_at")
    op.drop_index("ix_jobs_unended_retries", "jobs")
    op.drop_index("ix_jobs_whole_log", "jobs")
    op.drop_column("jobs", "log_pruned_at")
    op.drop_table("garbage")
