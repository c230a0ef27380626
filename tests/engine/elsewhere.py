"""What tests let another process do: ``python -m tests.engine.elsewhere resume|sample FOLDER``."""

import sys
from pathlib import Path

from shared.specs.tasks import Generate
from tests.engine.conftest import CPU, DATA, batch_at, small_spec
from worker.engine.checkpoint import Checkpoint, load_weights
from worker.engine.numerics import exact
from worker.engine.sampling import Tile, sample
from worker.engine.training import Trainer, build
from worker.families import FAMILIES
from worker.families.family import Draw


def resume(folder: Path) -> None:
    """Go on from every checkpoint in ``folder`` to the end of its training."""
    for path in folder.glob("*.half"):
        checkpoint = Checkpoint.read(path)
        family = FAMILIES["vae"]
        spec = family.spec.model_validate(checkpoint.spec)
        trainer = Trainer.resume(family, spec, DATA, CPU, checkpoint)
        while trainer.step < spec.steps:
            trainer.advance(batch_at(trainer.step))
        trainer.checkpoint().write(path.with_suffix(".resumed"))


def draw(folder: Path) -> None:
    """Draw samples 5, 1 and 3 of seed 9, in this order."""
    family, spec = FAMILIES["vae"], small_spec()
    net = build(family, spec, DATA)
    load_weights(folder / "model.safetensors", net)
    request = Generate(task="generate", model="bars", seed=9)
    draws = [Draw(request=request, index=index) for index in (5, 1, 3)]
    tile = Tile(net.eval(), family.tasks["generate"](spec, DATA), draws[0], CPU)
    for drawn, image in sample(tile, draws):
        (folder / f"{drawn.index}.bytes").write_bytes(image.numpy().tobytes())


if __name__ == "__main__":
    with exact(1):
        {"resume": resume, "draw": draw}[sys.argv[1]](Path(sys.argv[2]))
