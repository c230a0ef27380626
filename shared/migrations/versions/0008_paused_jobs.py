"""Which jobs are paused, whose inputs are kept."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_paused", "jobs", ["id"], postgresql_where=sa.text("state = 'paused'"))


def downgrade() -> None:
    op.drop_index("ix_jobs_paused", "jobs", postgresql_where=sa.text("state = 'paused'"))
