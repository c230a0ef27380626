"""Noisemill's own pages: static files that talk to the REST API with the visitor's key."""

from fastapi import APIRouter

router = APIRouter(include_in_schema=False)
