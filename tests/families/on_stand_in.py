"""Trains and draws from every family on the device of ``stand_in``, and prints what was noticed as JSON:
``python -m tests.families.on_stand_in [PART OF A NAME]``."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from shared.specs import FAMILIES as SPECS
from shared.specs import tasks
from shared.specs.training import TrainSpec
from tests.families.stand_in import Watch, set_up, without_numbers
from tests.jobs.conftest import SHAPE
from tests.jobs.variants import small, variants
from worker.engine import training
from worker.engine.capture import Act, Repeats, Tensors
from worker.engine.captured_steps import CapturedSteps
from worker.engine.numerics import Numerics, exact, for_sampling
from worker.engine.sampling import started
from worker.families import FAMILIES
from worker.families.family import DataInfo, Draw, Origin
from worker.kernels.noise import Domain, Noise

DATA: Final = DataInfo(shape=tuple(SHAPE), num_classes=4)
REQUESTS: Final = {
    kind.model_fields["task"].annotation.__args__[0]: kind
    for kind in vars(tasks).values()
    if isinstance(kind, type) and "task" in getattr(kind, "model_fields", {}) and "task" in kind.__annotations__
}
ENGINE_S: Final = ("schedule", "weights", "channels_last", "ema", "micro_batch")
"""Choices that are the same for all families: one is enough."""
ALTERED: Final = {"flip": 0.5, "shift": 2, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1}


def looked_at() -> Iterator[tuple[str, TrainSpec]]:
    """The variants of every family, in the precisions of GPUs, and what alters images."""
    for family, how in (("vae", {"augmentation": ALTERED}), ("diffusion", {"augment": 0.5})):
        yield (
            f"{family}, altered",
            SPECS[family].model_validate(small(family, SPECS[family], how | {"precision": "bf16"})),
        )
    for name, fields in variants():
        is_engine_s = any(f"-{field}=" in name for field in ENGINE_S) and fields["family"] != "vae"
        if fields["family"] in SPECS and not is_engine_s and not name.endswith("-fp32"):
            is_plain = name == f"{fields['family']}-{fields['precision']}"
            if fields["precision"] == "bf16" or is_plain:
                yield name, SPECS[fields["family"]].model_validate(fields)


def known(spec: TrainSpec) -> DataInfo:
    """What the network has to know, with the default model of each family that the spec names, or of one that will
    do."""
    described: dict[str, Origin] = {}
    for field, (ref, families) in spec.references().items():
        name = ref.partition("@")[0]
        family = name if name in families else min(families)
        begun = SPECS[family].model_validate({"family": family, "dataset": spec.dataset, "model": field})
        described[field] = Origin(family=family, spec=begun.model_dump(mode="json"), data=DATA)
    return replace(DATA, models=described)


def batch_of(spec: TrainSpec) -> dict[str, torch.Tensor]:
    """In main memory."""
    image = torch.zeros(spec.batch_size, *DATA.shape, dtype=torch.uint8)
    label = torch.zeros(spec.batch_size, dtype=torch.int64)
    return {"image": image, "label": label} | dict.fromkeys(spec.further_datasets, image)


def trains(spec: TrainSpec, device: torch.device, *, says: bool) -> Watch:
    """A step of a training."""
    precision: Any = spec.precision
    numerics = Numerics(precision=precision, channels_last=True, num_threads=1)
    with exact(1), without_numbers(says=says) as watch:
        trainer = training.Trainer(FAMILIES[family_of(spec)], spec, known(spec), device, numerics)
        watch.forget()
        trainer.advance(batch_of(spec))
    return watch


class Rehearsal:
    """A recorder that notes what a step waits for when it reads nothing but what it is given."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.waits: set[str] = set()

    def rehearse(self, act: Act) -> tuple[Tensors, None]:
        self.watch.forget()
        made = act()
        self.waits |= self.watch.waits
        return made, None

    def record(self, act: Act) -> Any:
        raise NotImplementedError


def repeats(spec: TrainSpec, device: torch.device, *, says: bool) -> Watch:
    """The second step of a training whose steps are captured."""
    precision: Any = spec.precision
    numerics = Numerics(precision=precision, channels_last=True, num_threads=1)
    with exact(1), without_numbers(says=says) as watch:
        trainer = training.Trainer(FAMILIES[family_of(spec)], spec, known(spec), device, numerics)
        trainer.captured = CapturedSteps(Repeats(rehearsal := Rehearsal(watch)))
        for _ in range(2):
            trainer.advance(batch_of(spec))
        watch.waits = rehearsal.waits
    return watch


def draws(spec: TrainSpec, task: str, device: torch.device, *, says: bool) -> Watch:
    """A step of two slots, and the end of one; what they begin with is made once, and may be waited for."""
    request = REQUESTS[task].model_construct(seed=1)
    image = torch.zeros(DATA.shape, dtype=torch.uint8)
    inputs = {"image": image, "style": image, "mask": torch.zeros(1, *DATA.shape[1:], dtype=torch.bool)}
    numerics = Numerics(precision="fp32", channels_last=True, num_threads=1)
    with exact(1), without_numbers(says=says) as watch, torch.no_grad():
        net = training.build(FAMILIES[family_of(spec)], spec, known(spec))
        net = for_sampling(net.to(device), numerics)
        sampler = FAMILIES[family_of(spec)].tasks[task](spec, known(spec))
        rows = [started(sampler, Draw(request=request, index=index, inputs=inputs), device) for index in range(2)]
        state = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        watch.forget()
        keys = {f"{name}_B": state[f"noise.{name}"] for name in ("seed", "step", "index")}
        noise = Noise(domain=Domain.SAMPLING, **keys)
        state |= sampler.step(net, state, noise)
        made = sampler.finish(net, {name: tensor[:1] for name, tensor in state.items()})
        assert made.device == device
    return watch


def family_of(spec: TrainSpec) -> str:
    return str(getattr(spec, "family", ""))


def planted(device: torch.device) -> dict[str, Any]:
    """What comes of the mistakes that this is to find, and of autocast."""
    mistakes: dict[str, Callable[[torch.Tensor], Any]] = {
        "lies elsewhere": lambda x: x + torch.zeros(2, 3),
        "asks": lambda x: x.sum().item(),
        "sends a list": lambda _: torch.tensor([1.0], device=device),
        "is fetched": lambda x: x.cpu(),
        "cannot be repeated": lambda x: x.cumsum(0),
        "goes on": lambda x: x.to(torch.float64, non_blocking=True).softmax(0).argmax(),
    }
    found: dict[str, Any] = {}
    for name, mistake in mistakes.items():
        with without_numbers(says=True) as watch:
            try:
                mistake(torch.zeros(2, 3, device=device))
            except Exception:  # noqa: BLE001 - torch's own kinds of it
                found[name] = "error"
            else:
                found[name] = "refused" if watch.refused else "waits" if watch.waits else "nothing"
    with without_numbers(says=True), torch.autocast(device.type, torch.bfloat16):
        x = torch.zeros(2, 3, device=device)
        found["autocast"] = [str(made.dtype) for made in (x @ x.T, (x @ x.T).softmax(0), (x @ x.T).relu())]
    return found


def noticed(act: Callable[..., Watch], *about: Any) -> dict[str, Any]:
    """What both answers to whatever was asked of numbers lead to."""
    found: dict[str, set[str]] = {"waits": set(), "refused": set(), "errors": set()}
    for says in (False, True):
        try:
            watch = act(*about, says=says)
        except Exception as error:  # noqa: BLE001 - what it was is what is looked for
            found["errors"].add(f"{type(error).__name__}: {error}"[:500])
        else:
            found["waits"] |= watch.waits
            found["refused"] |= watch.refused
            if not watch.was_asked:
                break
    return {name: sorted(one) for name, one in found.items()}


def moved(module: nn.Module, act: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply``, which cannot exchange the tensors of parameters that have no numbers."""
    for one in module.modules():
        for name, parameter in one.named_parameters(recurse=False):
            setattr(one, name, nn.Parameter(act(parameter.detach()), requires_grad=parameter.requires_grad))
        for name, buffer in one.named_buffers(recurse=False):
            setattr(one, name, act(buffer))
    return module


def prepare() -> torch.device:
    """The device, for an engine that builds networks in main memory and in earnest, and steps as on a GPU."""
    device, build, adamw = set_up(), training.build, torch.optim.AdamW

    def built(*about: Any) -> Any:
        with unset_fake_temporarily():
            return build(*about)

    training.build = built
    nn.Module._apply = moved
    torch.optim.AdamW = lambda *about, **how: adamw(*about, **how | {"fused": True})
    return device


def main(part: str = "") -> dict[str, Any]:
    device = prepare()
    found: dict[str, Any] = {"planted": planted(device)}
    for name, spec in looked_at():
        if part in name:
            found[name] = noticed(trains, spec, device)
            if (said := f"{name}, captured").count("-") <= 2 and spec.precision == "bf16":
                found[said] = noticed(repeats, spec, device)
        if name.count("-") == 1 and name.endswith("-bf16"):
            for task in FAMILIES[family_of(spec)].tasks:
                if part in (said := f"{family_of(spec)}: {task}"):
                    found[said] = noticed(draws, spec, task, device)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(*sys.argv[1:]), indent=1))
