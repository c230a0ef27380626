"""How the tables' columns and indexes are declared. Knows no table."""

from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from sqlalchemy import BigInteger, Column, DateTime, Enum, ForeignKey, Index, func, text
from sqlalchemy.dialects.postgresql import JSONB

NAMING: Final = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
"""Of constraints, so that migrations can name them."""


def _values_of(kind: type[StrEnum]) -> list[str]:
    return [member.value for member in kind]


def enum(kind: type[StrEnum], name: str) -> Enum:
    return Enum(kind, native_enum=False, length=16, name=name, create_constraint=True, values_callable=_values_of)


def time(*, default: bool = False, nullable: bool | None = None) -> Any:
    """``default``: when the row is made, and then, if nothing else is said, never NULL."""
    return Column(
        DateTime(timezone=True),
        server_default=func.clock_timestamp() if default else None,
        nullable=not default if nullable is None else nullable,
    )


def json(default: str | None = None) -> Any:
    return Column(JSONB, server_default=text(f"'{default}'::jsonb") if default else None, nullable=default is None)


def counter() -> Any:
    return Column(BigInteger, nullable=False, server_default=text("0"))


def owner(*, primary_key: bool = False) -> Any:
    return Column[UUID](ForeignKey("tenants.id"), nullable=False, primary_key=primary_key)


def partial(name: str, *columns: str, where: str) -> Index:
    return Index(name, *columns, postgresql_where=text(where))
