"""Schema migrations (Alembic). ``migrate`` is the one entry point; there is no alembic.ini."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import make_url


def alembic_config(url: str) -> Config:
    """Alembic's configuration for a database URL."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    rendered = make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    config.set_main_option("sqlalchemy.url", rendered.replace("%", "%%"))
    return config


def migrate(url: str, revision: str = "head") -> None:
    """Bring the schema to ``revision``. Several callers at once are safe: one works, the rest wait."""
    command.upgrade(alembic_config(url), revision)
