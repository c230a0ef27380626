"""``python -m noisemill`` is ``noisemill``."""

from noisemill.cli import main

main()
