"""The whole of Noisemill on one machine, from real parts: servers, API, workers and Flower.

Needs the ``local`` extra. Importing it is cheap; what is heavy is imported when used.
"""

from noisemill.local.processes import LocalError
from noisemill.local.stack import PartStatus, Stack

__all__ = ["LocalError", "PartStatus", "Stack"]
