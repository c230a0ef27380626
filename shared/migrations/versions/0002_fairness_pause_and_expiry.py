"""Fair shares, usage, retries, preemption, claims found again, expiry."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

OUTCOMES = ("succeeded", "failed", "canceled", "paused", "interrupted", "lost")


def _outcomes(*names: str) -> None:
    op.drop_constraint(op.f("ck_attempts_outcome"), "attempts", type_="check")
    listed = ", ".join(f"'{name}'" for name in names)
    op.create_check_constraint(op.f("ck_attempts_outcome"), "attempts", f"outcome IN ({listed})")


def upgrade() -> None:
    _outcomes(*OUTCOMES, "preempted")
    op.add_column("attempts", sa.Column("token", sa.Uuid(), nullable=True))
    op.create_index("ix_attempts_token", "attempts", ["token"], postgresql_where=sa.text("ended_at IS NULL"))

    op.add_column("jobs", sa.Column("preempt_fence", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("retry_of", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("erased_at", sa.DateTime(timezone=True), nullable=True))
    op.create_foreign_key(op.f("fk_jobs_retry_of"), "jobs", "jobs", ["retry_of"], ["id"])
    op.create_unique_constraint(op.f("uq_jobs_retry_of"), "jobs", ["retry_of"])
    op.create_check_constraint(op.f("ck_jobs_priority_known"), "jobs", "priority BETWEEN 0 AND 2")
    op.drop_index("ix_jobs_claim", "jobs")
    op.create_index(
        "ix_jobs_waiting",
        "jobs",
        ["tenant_id", "queue", "priority", "queued_at", "id"],
        postgresql_where=sa.text("state = 'queued'"),
    )

    op.add_column("artifacts", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("artifacts", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))

    op.create_table(
        "usage",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("fence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_usage_tenant_id")),
        sa.PrimaryKeyConstraint("job_id", "fence", name=op.f("pk_usage")),
    )
    op.create_index("ix_usage_line", "usage", ["tenant_id", "priority", "created_at"])
    op.create_index("ix_usage_queue", "usage", ["queue", "created_at"])
    op.create_table(
        "shares",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("attained", sa.Double, server_default=sa.text("0"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_shares_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_shares")),
    )


def downgrade() -> None:
    op.drop_table("shares")
    op.drop_table("usage")
    op.drop_column("artifacts", "removed_at")
    op.drop_column("artifacts", "expires_at")
    op.drop_index("ix_jobs_waiting", "jobs")
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        ["queue", sa.text("priority DESC"), "queued_at", "id"],
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.drop_constraint(op.f("ck_jobs_priority_known"), "jobs")
    op.drop_column("jobs", "erased_at")
    op.drop_constraint("uq_jobs_retry_of", "jobs")
    op.drop_column("jobs", "retry_of")
    op.drop_column("jobs", "preempt_fence")
    op.drop_index("ix_attempts_token", "attempts")
    op.drop_column("attempts", "token")
    op.execute("UPDATE attempts SET outcome = 'interrupted' WHERE outcome = 'preempted'")
    _outcomes(*OUTCOMES)
