"""How often workers found the model of a job loaded."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

COUNTS = ("model_hits", "model_misses")


def upgrade() -> None:
    for name in COUNTS:
        op.add_column("workers", sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    for name in COUNTS:
        op.drop_column("workers", name)
