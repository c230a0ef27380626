"""The tables of aliases: names for versions of models, and how they were moved."""

# SQLModel types ``__tablename__`` as a method and documents assigning a string to it.
# pyright: reportAssignmentType=false

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, Integer, Text, UniqueConstraint, text
from sqlmodel import Field, SQLModel

from shared.ids import uuid7
from shared.jobs import columns
from shared.jobs.rows import JsonObject


class ModelAlias(SQLModel, table=True):
    """A name for a version of a model, which can be moved to another. Changed only by ``aliases.py``."""

    __tablename__ = "model_aliases"
    __table_args__ = (UniqueConstraint("model_id", "name"),)

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    model_id: UUID = Field(sa_column=Column(ForeignKey("models.id"), nullable=False))
    name: str = Field(sa_column=Column(Text, nullable=False))
    version_id: UUID = Field(sa_column=Column(ForeignKey("model_versions.id"), nullable=False, index=True))
    gate: list[JsonObject] = Field(default_factory=list, sa_column=columns.json("[]"))
    """What a version has to show before the alias is moved to it (``shared/specs/gate.py``)."""
    move_id: UUID
    """The latest entry of its history: no two states of an alias have the same."""
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))


class AliasMove(SQLModel, table=True):
    """One entry of an alias's history, which outlives the alias. Never changed."""

    __tablename__ = "alias_moves"
    __table_args__ = (
        Index("ix_alias_moves_history", "model_id", "alias", text("id DESC")),
        CheckConstraint("from_version IS NOT NULL OR to_version IS NOT NULL", name="says_something"),
    )

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    model_id: UUID = Field(sa_column=Column(ForeignKey("models.id"), nullable=False))
    alias: str = Field(sa_column=Column(Text, nullable=False))
    from_version: int | None = Field(default=None, sa_column=Column(Integer))
    """None: the alias was new."""
    to_version: int | None = Field(default=None, sa_column=Column(Integer))
    """None: the alias was removed."""
    gate: list[JsonObject] = Field(default_factory=list, sa_column=columns.json("[]"))
    """As it was from then on."""
    checks: list[JsonObject] = Field(default_factory=list, sa_column=columns.json("[]"))
    """What the version had to show, and did."""
    key_id: UUID = Field(sa_column=Column(ForeignKey("api_keys.id"), nullable=False))
    created_at: datetime | None = Field(default=None, sa_column=columns.time(default=True))
