"""Who waits for whom. Rows are written with the job that waits (``admission.py``) and read by ``needs.py``."""

# SQLModel types ``__tablename__`` as a method and documents assigning a string to it.
# pyright: reportAssignmentType=false

from uuid import UUID

from sqlalchemy import Column, ForeignKey, Index, Text
from sqlmodel import Field, SQLModel

from shared.jobs import columns
from shared.jobs.rows import JsonObject


class Need(SQLModel, table=True):
    """That a job was submitted with a model, named by a field of its spec, which another job was still to make."""

    __tablename__ = "needs"
    __table_args__ = (Index("ix_needs_needs_job_id", "needs_job_id"),)

    job_id: UUID = Field(sa_column=Column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True))
    field: str = Field(sa_column=Column(Text, primary_key=True))
    needs_job_id: UUID
    """No foreign key: its check would wait for whoever holds the row of that job. Rows of jobs are never deleted."""
    told: JsonObject = Field(default_factory=dict, sa_column=columns.json("{}"))
    """What the model's ``info`` has to say, for that is what the job was accepted for."""
