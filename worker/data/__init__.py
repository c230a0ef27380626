"""Ingestion of uploads and the canonical datasets made of them. Needs numpy and Pillow, never torch."""
