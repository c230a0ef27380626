"""What is known of memory before any is taken: what there is, and what will be needed at least."""

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.errors import OutOfMemory
from shared.specs import FAMILIES as SPECS
from shared.specs.tasks import Generate
from tests.engine.conftest import CPU, DATA
from worker.engine import estimate, memory
from worker.engine.estimate import require, require_sample, start_bytes, step_bytes, training_bytes
from worker.engine.models import MODELS
from worker.engine.sampling import started
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import Draw, SlotState
from worker.kernels.noise import Noise

MEBIBYTE = 2**20


class Ballooning:
    """A sampler whose step has two tensors of a number of floats alive at one time."""

    def __init__(self, num_floats: int) -> None:
        self.num_floats = num_floats

    def num_steps(self, request: Any) -> int:
        return 1

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        return {"x": torch.zeros(len(draws), 1, device=noise.device)}

    def step(self, net: nn.Module, state: SlotState, noise: Noise) -> SlotState:
        wide = net(state["x"]).expand(-1, self.num_floats).clone()
        if bool(state["x"].any()):  # numbers of the slot are there
            raise ValueError("it began at zero")
        wide = nn.functional.silu(wide)
        view = wide.view(1, 1, -1, 4)
        attended = nn.functional.scaled_dot_product_attention(view, view, view)
        return {"x": attended.flatten(1)[:, :1]}

    def finish(self, net: nn.Module, state: SlotState) -> Tensor:
        return state["x"]


def draw() -> Draw[Any]:
    return Draw(request=Generate(task="generate", model="m@1", seed=1), index=0)


def test_a_step_is_counted_without_being_done() -> None:
    """It would take 2 TiB, and 2^77 bytes for the scores of its attention."""
    sampler, net = Ballooning(2**38), nn.Linear(1, 1)

    counted = step_bytes(net, sampler, started(sampler, draw(), CPU))

    assert counted == pytest.approx(2 * 4 * 2**38, rel=1e-6)
    assert not any(parameter.is_meta for parameter in net.parameters())


def test_what_only_numbers_can_tell_leaves_no_estimate() -> None:
    class Choosy(Ballooning):
        def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
            return {"x": noise.normal(4)[noise.normal(4) > 0]}

    assert start_bytes(Choosy(4), draw()) is None


@pytest.mark.parametrize("family", ["vae", "vq", "gan", "diffusion"])
def test_a_training_is_known_by_the_bytes_it_will_hold(family: str) -> None:
    spec = SPECS[family].model_validate({"family": family, "dataset": "ds_" + "0" * 32, "model": "m"})

    counted = training_bytes(FAMILIES[family], spec, DATA)

    trainer = Trainer(FAMILIES[family], spec, DATA, CPU)
    held = [tensor for net in (trainer.net, trainer.average) for tensor in net.state_dict().values()]
    trained = [tensor for tensor in trainer.net.parameters() if tensor.requires_grad]
    assert counted == sum(tensor.nbytes for tensor in (*held, *trained, *trained, *trained))


def test_what_does_not_fit_is_refused_with_both_figures(small_machine: Any) -> None:
    small_machine(3 * MEBIBYTE)

    figures = r"a step .* takes at least .* \(8388616 bytes\) of memory, and cpu has .* \(3145728 bytes\) left"
    with pytest.raises(OutOfMemory, match=figures):
        require_sample(nn.Linear(1, 1), Ballooning(MEBIBYTE), draw(), (1, 512, 512), CPU)


def test_what_fits_is_not_refused(small_machine: Any) -> None:
    small_machine(9 * MEBIBYTE)

    require_sample(nn.Linear(1, 1), Ballooning(MEBIBYTE), draw(), (1, 512, 512), CPU)


def test_models_that_nobody_uses_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    MODELS.take("unused", lambda: nn.Linear(2, 2))
    MODELS.give_back("unused")
    monkeypatch.setattr(estimate, "room", lambda device: 10 if "unused" in MODELS else 1000)

    require(500, CPU, "something")

    assert "unused" not in MODELS


def test_a_limit_of_the_process_counts() -> None:
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 256 * MEBIBYTE, most))
    try:
        left = memory.room(CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))

    assert left is not None
    assert 0 < left <= 256 * MEBIBYTE


@pytest.mark.parametrize(
    ("group", "files"),
    [
        (
            "0::/a/b",
            {"a/memory.max": "900", "a/memory.current": "600", "a/b/memory.max": "max", "a/b/memory.current": "1"},
        ),
        ("4:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": "900", "memory/a/memory.usage_in_bytes": "600"}),
    ],
    ids=["version 2, by a group further up", "version 1"],
)
def test_a_limit_of_a_control_group_counts(
    group: str, files: dict[str, str], small_machine: Any, tmp_path: Path
) -> None:
    small_machine(MEBIBYTE)
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/\n{group}\n")
    for name, content in files.items():
        path = tmp_path / "cgroups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        (path.parent / "memory.stat").write_text("anon 1\ninactive_file 50\ntotal_inactive_file 50\n")

    assert memory.room(CPU) == 900 - 600 + 50
