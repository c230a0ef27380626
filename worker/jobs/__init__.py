"""Executors: one module per job type, each a function from a Run to a JSON result."""
