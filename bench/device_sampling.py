"""The sampling parts of ``bench/device.py``: one large batch, and requests of different steps that share a tile."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from bench.device_parts import Bench, counted
from bench.device_training import DATASET, ENGINE
from bench.kernels import check
from bench.limits import Work
from bench.timing import Maker, Step
from bench.usual import DEFAULT, TUNED, USUAL, Manner, ddim, predictor, unzeroed
from shared.specs.diffusion import DiffusionSpec
from shared.specs.tasks import Generate
from worker.engine.captured_calls import Called, called
from worker.engine.numerics import Numerics, exact, for_sampling
from worker.engine.sampling import Tile, sample
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo, Draw

FEWEST, MOST = 10, 50
"""Steps of a request."""
SERIAL: Final = 8
"""Requests that are served one after another: their mean is that of all, and more would take minutes."""


class _Model:
    """A diffusion model with its sampler; in the precision that jobs draw in, or in another."""

    def __init__(self, bench: Bench, precision: str = "fp32") -> None:
        preset, shape = ("xs", (3, 8, 8)) if bench.is_tiny else ("b", (3, 32, 32))
        fields = {"dataset": DATASET, "model": "bench", "preset": preset, "objective": "eps", "precision": precision}
        self.device = bench.device
        self.preset, self.shape = preset, shape
        self.spec = DiffusionSpec.model_validate({"family": "diffusion", **fields})
        self.data = DataInfo(shape=shape)
        self.numerics = Numerics.choose(self.spec, bench.device)

    def network(self) -> nn.Module:
        net = unzeroed(build(FAMILIES["diffusion"], self.spec, self.data)).eval()
        return self.numerics.place_network(net, self.device)

    def tile(self, width: int, net: nn.Module | Called | None = None) -> Tile[Any]:
        sampler = FAMILIES["diffusion"].tasks["generate"](self.spec, self.data)
        return Tile(net or self.network(), sampler, draw_of(0, MOST), self.device, width)

    def repeating(self) -> Called:
        """The network as jobs have it that ask for captured calls."""
        return called(for_sampling(self.network(), self.numerics), self.device)

    def drawing(
        self, width: int, draws: Sequence[Draw[Any]], group: int | None = None, net: nn.Module | Called | None = None
    ) -> Step:
        """All draws through one tile, or in groups of which each begins when the one before is done."""
        tile = self.tile(width, net)
        size = group or len(draws)

        def draw() -> None:
            with exact(), self.numerics.autocast(self.device):
                for first in range(0, len(draws), size):
                    for _ in sample(tile, draws[first : first + size]):
                        pass

        return draw


def draw_of(number: int, steps: int) -> Draw[Any]:
    """The only sample of a request of its own."""
    request = Generate(task="generate", model="bench", seed=number, num_samples=1, steps=steps, solver="ddim")
    return Draw(request=request, index=0)


def captured_checks(model: _Model, width: int, steps: int) -> dict[str, float | bool]:
    """Whether a tile whose network's calls are repeated draws the very bytes of a plain one, and whether any were; also
    of another network of the architecture, whose weights are copied."""
    draws = [draw_of(number, steps) for number in range(width)]
    with exact():
        nets = [model.repeating() for _ in range(2)]
        repeated = [[image for _, image in sample(model.tile(width, net), draws)] for net in nets]
        plain = [[image for _, image in sample(model.tile(width, net.plain), draws)] for net in nets]
    is_same = all(torch.equal(*pair) for two in zip(repeated, plain, strict=True) for pair in zip(*two, strict=True))
    return {"is_captured": all(net.trouble is None for net in nets), "same_bits": is_same}


def one_batch(bench: Bench) -> None:
    """DDIM of 50 steps for 64 samples."""
    steps, batch = (3, 2) if bench.is_tiny else (50, 64)
    model = _Model(bench)
    whose, _ = predictor(model.preset, model.shape)
    draws = [draw_of(number, steps) for number in range(batch)]

    def by_script(manner: Manner) -> Step:
        return ddim(predictor(model.preset, model.shape)[1], (batch, *model.shape), steps, bench.device, manner)

    makers: dict[str, Maker] = {
        f"{whose}, {DEFAULT}": lambda: by_script(USUAL),
        f"{whose}, {TUNED}": lambda: by_script(Manner(is_tuned=True)),
        f"{whose}, {TUNED} (compiled)": lambda: by_script(Manner(is_tuned=True, compiles=True, mode="reduce-overhead")),
        f"{ENGINE} in fp32": lambda: model.drawing(batch, draws),
        f"{ENGINE} in fp32, captured": lambda: model.drawing(batch, draws, net=model.repeating()),
        f"{ENGINE} in bf16": lambda: _Model(bench, "bf16").drawing(batch, draws),
    }
    if not bench.compiles:
        del makers[f"{whose}, {TUNED} (compiled)"]
    check(bench, f"DDIM-{steps}", f"B={batch}, captured", lambda: captured_checks(model, batch, steps))
    evaluation = counted(model.spec, model.data, bench.device).forward(batch)
    work = Work(flops=evaluation.flops * steps, num_bytes=evaluation.num_bytes * steps)
    bench.record(f"DDIM-{steps}", f"B={batch}", bench.clock.compete(makers), work)


def shared_steps(bench: Bench) -> None:
    """Requests of 10 to 50 steps, all there from the start: seconds for each of them until the last is done."""
    num_requests, width, serial = (4, 2, 2) if bench.is_tiny else (64, 32, SERIAL)
    fewest, most = (1, 3) if bench.is_tiny else (FEWEST, MOST)
    steps = [fewest + number * 17 % (most - fewest + 1) for number in range(num_requests)]
    model = _Model(bench)
    whose, _ = predictor(model.preset, model.shape)
    draws = [draw_of(number, count) for number, count in enumerate(steps)]

    def by_script() -> Step:
        net = predictor(model.preset, model.shape)[1]
        each = [ddim(net, (1, *model.shape), count, bench.device, USUAL) for count in steps[:serial]]
        return lambda: [draw() for draw in each]

    def through_tiles(precision: str) -> dict[str, Maker]:
        def maker(width: int, draws: Sequence[Draw[Any]], group: int | None = None) -> Maker:
            return lambda: _Model(bench, precision).drawing(width, draws, group)

        return {
            f"one after another in {precision}": maker(1, draws[:serial]),
            f"request-level batches in {precision}": maker(width, draws, width),
            f"continuous batching in {precision}": maker(width, draws),
        }

    serially = f"{whose}, {DEFAULT}, one after another"
    makers: dict[str, Maker] = {serially: by_script, **through_tiles("fp32"), **through_tiles("bf16")}
    units = {name: serial if "one after another" in name else num_requests for name in makers}
    evaluation = counted(model.spec, model.data, bench.device).forward(1)
    mean_steps = sum(steps) / len(steps)
    work = Work(flops=evaluation.flops * mean_steps, num_bytes=evaluation.num_bytes * mean_steps / width)
    case = f"{num_requests} requests of {mean_steps:.0f} steps in the mean, {width} slots"
    bench.record("shared steps", case, bench.clock.compete(makers, units), work)
