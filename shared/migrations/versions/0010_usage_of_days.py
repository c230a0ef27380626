"""What old attempts used, summed by days."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "usage_of_days",
        sa.Column("tenant_id", sa.Uuid(), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("day", sa.Date(), primary_key=True),
        sa.Column("queue", sa.Text(), primary_key=True),
        sa.Column("priority", sa.SmallInteger(), primary_key=True, autoincrement=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("seconds", sa.Double[float](), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("usage_of_days")
