"""Noisemill: what a user imports. Light: no web framework, no database, no torch."""
