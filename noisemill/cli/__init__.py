"""The command line: ``noisemill``. Thin: parses, asks the client, prints.

Exit codes: 0 done, 1 it failed, 2 wrong usage, 130 interrupted.
"""

from noisemill.cli.app import app, main

__all__ = ["app", "main"]
