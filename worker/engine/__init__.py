"""Trains and samples any family. Needs torch and pydantic alone: no queue, no database, no storage."""
