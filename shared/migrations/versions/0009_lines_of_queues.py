"""When a tenant was served last in a queue at a priority."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def _index(*columns: str) -> None:
    op.drop_index("ix_usage_line", "usage")
    op.create_index("ix_usage_line", "usage", ["tenant_id", *columns, "created_at"])


def upgrade() -> None:
    _index("queue", "priority")


def downgrade() -> None:
    _index("priority")
