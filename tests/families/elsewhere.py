"""What the tests of invariance let another process draw: ``python -m tests.families.elsewhere FILE [every task]``."""

import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.families import test_invariance_of_tasks as of_tasks
from tests.families.test_invariance import drawn, network, plain_specs, requests
from worker.engine.numerics import exact
from worker.families import diffusion


def draw(path: Path) -> None:
    """Draw the first request's sample of each family, among strangers who come in another order than anywhere else."""
    found = {}
    for family, spec in plain_specs().items():
        first, *strangers = requests(spec, num_strangers=5)
        found[family] = drawn(spec, network(spec), [first, *reversed(strangers)], late=2)
    save_file(found, path)


def draw_every_task(path: Path) -> None:
    """The same of all that models can be asked."""
    diffusion.ENCODING_STEPS = of_tasks.ENCODING_STEPS  # pyright: ignore[reportAttributeAccessIssue]
    found = {}
    for name, (spec, task) in of_tasks.cases().items():
        first, *strangers = of_tasks.requests(spec, task, num_strangers=5)
        found[name] = of_tasks.drawn(spec, of_tasks.network(spec), [first, *reversed(strangers)], late=2)
    save_file(found, path)


if __name__ == "__main__":
    with exact(1):
        (draw_every_task if sys.argv[2:] else draw)(Path(sys.argv[1]))
