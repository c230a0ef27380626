"""Jobs that make a model of files that another library has written."""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

BEFORE = ("train", "generate", "evaluate", "ingest", "export", "reaverage")


def upgrade() -> None:
    _allow(*BEFORE, "import")


def downgrade() -> None:
    """Fails while there are such jobs: their versions would be of no known job."""
    _allow(*BEFORE)


def _allow(*types: str) -> None:
    op.drop_constraint(op.f("ck_jobs_type"), "jobs", type_="check")
    listed = ", ".join(f"'{one}'" for one in types)
    op.create_check_constraint(op.f("ck_jobs_type"), "jobs", f"type IN ({listed})")
