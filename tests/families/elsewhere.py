"""What the tests of invariance let another process draw: ``python -m tests.families.elsewhere FILE``."""

import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.families.test_invariance import drawn, network, plain_specs, requests
from worker.engine.numerics import exact


def draw(path: Path) -> None:
    """Draw the first request's sample of each family, among strangers who come in another order than anywhere else."""
    found = {}
    for family, spec in plain_specs().items():
        first, *strangers = requests(spec, num_strangers=5)
        found[family] = drawn(spec, network(spec), [first, *reversed(strangers)], late=2)
    save_file(found, path)


if __name__ == "__main__":
    with exact(1):
        draw(Path(sys.argv[1]))
