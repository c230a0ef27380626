"""What tests let another process do: ``python -m tests.engine.elsewhere resume|draw FOLDER|confined|lightly``."""

import resource
import sys
from pathlib import Path

import torch

from shared.specs.tasks import Generate
from tests.engine.conftest import CPU, DATA, batch_at, small_spec
from worker.engine.checkpoint import Checkpoint, load_weights
from worker.engine.estimate import require_sample
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


def confined() -> None:
    """Print how many samples at once a step took with enough memory, with too little, and with enough again."""
    spec = small_spec(network="mlp", hidden_dim=2048, batch_size=4096, precision="fp32")
    batch = {"image": torch.zeros(4096, *DATA.shape, dtype=torch.uint8)}
    everything = resource.getrlimit(resource.RLIMIT_AS)
    for room in (None, 48 * 2**20, None):
        trainer = Trainer(FAMILIES["vae"], spec, DATA, CPU)
        trainer.advance({"image": batch["image"][:8]})
        if room is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + room, everything[1]))
        trainer.advance(batch)
        resource.setrlimit(resource.RLIMIT_AS, everything)
        print(trainer.micro_batch)


def lightly() -> None:
    """Draw a sample as a job of a small model does; print which of torch's compilers were imported for that."""
    family, spec = FAMILIES["vae"], small_spec()
    net, sampler = build(family, spec, DATA).eval(), family.tasks["generate"](spec, DATA)
    draws = [Draw(request=Generate(task="generate", model="bars", seed=9), index=0)]
    require_sample(net, sampler, draws[0], DATA.shape, CPU)
    list(sample(Tile(net, sampler, draws[0], CPU), draws))
    print(sorted({"torch._dynamo", "torch._inductor"} & sys.modules.keys()))


def address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    acts = {"resume": resume, "draw": draw, "confined": confined, "lightly": lightly}
    with exact(1):
        acts[sys.argv[1]](*map(Path, sys.argv[2:]))
