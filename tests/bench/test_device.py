"""The measurements on a device run from end to end, tiny and on a CPU; nothing is said of what they come to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import device, usual
from bench.device_parts import Bench
from bench.limits import Ceilings, Work, count
from bench.timing import OUT_OF_TIME, Clock
from shared.specs.unet import UNETS
from worker.families.nets.unet import UNet

CPU = torch.device("cpu")
UNCOUNTED = {"DCGAN training"}
"""Whose limit nobody counts."""


def bench_of(**clock: Any) -> Bench:
    ceilings = Ceilings(flops_per_second=1e12, bytes_per_second=1e11)
    return Bench(clock=Clock(device=CPU, rounds=1, block_seconds=0, **clock), ceilings=ceilings, is_tiny=True)


def num_weights(net: nn.Module) -> int:
    return sum(weight.numel() for weight in net.parameters())


@pytest.mark.parametrize("part", device.PARTS)
def test_every_part_runs_and_fills_its_rows(part: str):
    bench = bench_of()

    device.run(part, device.PARTS[part], bench)
    timed = [row for row in bench.rows if "checks" not in row]
    assert [row for row in timed if "error" in row] == []
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in timed)
    assert all(row["limit"] > 0 and row["share_of_limit"] > 0 for row in timed if row["part"] not in UNCOUNTED)
    assert len(device.table(bench.rows).splitlines()) > len(bench.rows)


def test_where_diffusers_is_installed_its_network_is_the_one_that_is_timed():
    """As large as ours to the weight, and it goes through the same loops."""
    pytest.importorskip("diffusers")
    whose, net = usual.predictor("s", (3, 8, 8))

    step = usual.training(net, torch.ones(1, 3, 8, 8), usual.USUAL)
    step()
    drawn = usual.ddim(net, (1, 3, 8, 8), 2, CPU, usual.USUAL)()
    assert whose == "diffusers"
    assert num_weights(net) == num_weights(UNet(UNETS["s"], 3))
    assert isinstance(drawn, torch.Tensor) and drawn.dtype == torch.uint8


def test_a_part_that_breaks_is_told_of_and_the_next_one_runs():
    bench = bench_of()

    def broken(bench: Bench) -> None:
        raise RuntimeError("no such kernel")

    device.run("broken", broken, bench)
    device.run("noise", device.PARTS["noise"], bench)
    assert "no such kernel" in bench.rows[0]["error"]
    assert any("seconds" in row for row in bench.rows[1:])
    assert "no such kernel" in device.table(bench.rows)


def test_a_contestant_that_breaks_leaves_the_others_alone():
    calls: list[int] = []

    def unmakeable() -> Any:
        raise RuntimeError("cannot be made")

    def failing() -> None:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("fails later")

    makers = {"one": unmakeable, "two": lambda: failing, "three": lambda: lambda: None}
    timings = Clock(device=CPU, rounds=5, block_seconds=0).compete(makers)
    assert "cannot be made" in (timings["one"].error or "")
    assert "fails later" in (timings["two"].error or "") and len(timings["two"].seconds) == 1
    assert len(timings["three"].seconds) == 5


def test_contestants_take_turns_forwards_and_backwards():
    calls: list[str] = []
    makers = {name: lambda name=name: lambda: calls.append(name) for name in "abc"}

    Clock(device=CPU, rounds=3, block_seconds=0).compete(makers)
    assert "".join(calls) == "aaaa" + "bbbb" + "cccc" + "abc" + "cba" + "abc"


def test_nothing_begins_after_the_deadline():
    bench = bench_of(deadline=0.0)

    device.run("noise", device.PARTS["noise"], bench)
    assert [row["error"] for row in bench.rows] == [OUT_OF_TIME]
    assert bench.clock.compete({"one": lambda: lambda: None})["one"].error == OUT_OF_TIME


def test_a_call_that_does_many_units_of_work_is_told_for_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Clock, "_elapsed", lambda self, step, calls: 6.0)

    timings = Clock(device=CPU).compete({"one": lambda: lambda: None}, {"one": 3})
    assert timings["one"].median == 2.0


def test_operations_and_bytes_are_counted():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    x = torch.ones(2, 3, 5, 5)

    found = count(net, lambda: net(x), 2)
    assert found.forward_flops == 2 * 25 * (3 * 8 * 9 + 8 * 4)
    # Nobody asks for the gradient by the image.
    assert found.training_flops == 2 * 25 * (2 * 3 * 8 * 9 + 3 * 8 * 4)
    assert (found.num_products, found.num_normalised) == (25 * (3 + 8 + 8 + 4), 25 * 8)
    assert found.forward(4).num_bytes == 2 * (4 * (25 * 23 + 2 * 200) + found.num_parameters)


def test_the_limit_is_the_longer_of_both():
    ceilings = Ceilings(flops_per_second=100, bytes_per_second=10)

    assert Work(flops=300, num_bytes=20).seconds(ceilings) == 3
    assert Work(flops=100, num_bytes=20).seconds(ceilings) == 2


def test_the_command_writes_json_and_prints_the_table_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "device.json"

    device.main(["--tiny", "--rounds", "1", "--only", "noise,optimizer", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found.keys() == {"machine", "versions", "tiny", "ceilings", "seconds_of_parts", "rows"}
    assert found["tiny"] and found["ceilings"]["flops_per_second"] > 0
    assert found["seconds_of_parts"].keys() == {"noise", "optimizer"}
    assert capsys.readouterr().out.endswith(device.table(found["rows"]) + "\n")
