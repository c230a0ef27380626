"""A sample's bits depend on (weights, request, index): not on neighbours, number, order, slot or process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.specs.tasks import Generate, Reconstruct
from tests.engine.conftest import CPU, DATA, bars, small_spec
from tests.engine.toy import TOY, ToySpec, Walk, Walker
from worker.engine import models
from worker.engine.checkpoint import write_weights
from worker.engine.models import ModelCache, size_bytes
from worker.engine.sampling import Line, Tile, sample
from worker.engine.tile_width import widest
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo, Draw
from worker.kernels.noise import Domain, Noise

VAE = FAMILIES["vae"]
ODD = DataInfo(shape=(3, 10, 17))


def net_of(data: DataInfo = DATA, **fields: Any) -> nn.Module:
    return build(VAE, small_spec(**fields), data).eval()


def draws_of(*indices: int, seed: int = 9) -> list[Draw[Any]]:
    request = Generate(task="generate", model="bars", seed=seed)
    return [Draw(request=request, index=index) for index in indices]


class Exposed:
    """A task's sampler whose output is the last state in full, before rounding to bytes could hide a bit."""

    def __init__(self, inner: Any) -> None:
        self.num_steps, self.start, self.step = inner.num_steps, inner.start, inner.step

    def finish(self, net: nn.Module, state: dict[str, torch.Tensor]) -> torch.Tensor:
        return state["x"]


def tile_of(net: nn.Module, draws: list[Draw[Any]], data: DataInfo = DATA, **fields: Any) -> Tile[Any]:
    sampler = Exposed(VAE.tasks[draws[0].request.task](small_spec(**fields), data))
    return Tile(net, sampler, draws[0], CPU)


def drawn(net: nn.Module, draws: list[Draw[Any]], data: DataInfo = DATA, **fields: Any) -> dict[int, torch.Tensor]:
    return {draw.index: image for draw, image in sample(tile_of(net, draws, data, **fields), draws)}


@pytest.mark.parametrize("data", [DATA, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("indices", [range(1), range(2), range(7), range(63, -1, -1), (40, 3, 40 - 1, 63)])
def test_a_sample_does_not_depend_on_what_is_drawn_with_it(data: DataInfo, network: str, indices: range) -> None:
    net = net_of(data, network=network)
    alone = drawn(net, draws_of(*range(64)), data, network=network)

    together = drawn(net, draws_of(*indices), data, network=network)

    assert list(together) == list(indices)
    assert all(torch.equal(image, alone[index]) for index, image in together.items())


def test_a_stranger_in_the_same_tile_changes_nothing() -> None:
    net = net_of()
    mixed = [draw for pair in zip(draws_of(0, 1, 2), draws_of(7, 8, 9, seed=4), strict=True) for draw in pair]

    shared = {(draw.request.seed, draw.index): image for draw, image in sample(tile_of(net, mixed), mixed)}

    for seed, indices in ((9, (0, 1, 2)), (4, (7, 8, 9))):
        for index, image in drawn(net, draws_of(*indices, seed=seed)).items():
            assert torch.equal(shared[seed, index], image)


def test_a_reconstruction_does_not_depend_on_its_neighbours() -> None:
    net = net_of()
    request = Reconstruct(task="reconstruct", model="bars", dataset="ds_" + "0" * 32)
    draws = [Draw(request=request, index=index, inputs={"image": bars()[index]}) for index in range(20)]

    together, alone = drawn(net, draws), drawn(net, draws[13:14])
    assert torch.equal(together[13], alone[13])


def test_another_process_draws_the_same_bytes(tmp_path: Path) -> None:
    net = net_of()
    write_weights(tmp_path / "model.safetensors", net, {})

    subprocess.run([sys.executable, "-m", "tests.engine.elsewhere", "draw", str(tmp_path)], check=True, timeout=60)

    tile = Tile(net, VAE.tasks["generate"](small_spec(), DATA), draws_of(0)[0], CPU)
    for draw, image in sample(tile, draws_of(0, 1, 2, 3, 4, 5)):
        if draw.index in (1, 3, 5):
            assert (tmp_path / f"{draw.index}.bytes").read_bytes() == image.numpy().tobytes()


def test_to_draw_a_sample_no_compiler_of_torch_is_imported() -> None:
    """It takes as long as importing all the rest of torch, and the first job of a runner would wait for it."""
    command = [sys.executable, "-m", "tests.engine.elsewhere", "lightly"]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)

    assert done.stdout.strip() == "[]"


def walks(*lengths: int) -> list[Draw[Walk]]:
    return [Draw(request=Walk(seed=index, steps=steps), index=0) for index, steps in enumerate(lengths)]


def toy_tile(net: nn.Module) -> Tile[Walk]:
    return Tile(net, TOY.tasks["walk"](ToySpec(dataset="ds_" + "0" * 32, model="toy"), DATA), walks(1)[0], CPU)


@pytest.fixture(scope="module")
def toy_net() -> nn.Module:
    return build(TOY, ToySpec(dataset="ds_" + "0" * 32, model="toy"), DATA).eval()


def test_samples_of_different_lengths_share_a_tile(toy_net: nn.Module) -> None:
    draws = walks(*[1, 5, 2, 9, 3, 3, 7, 1, 4, 6, 2, 8])

    together = {draw.request.seed: image for draw, image in sample(toy_tile(toy_net), draws)}

    assert together.keys() == set(range(12))
    for draw in draws:
        [(_, alone)] = sample(toy_tile(toy_net), [draw])
        assert torch.equal(together[draw.request.seed], alone)


def test_each_step_of_the_tile_is_told_with_all_that_is_done(toy_net: nn.Module) -> None:
    """Twelve samples in eight slots: the last step of a sample is counted by who takes it."""
    lengths, told, taken = [1, 5, 2, 9, 3, 3, 7, 1, 4, 6, 2, 8], list[int](), list[int]()

    for _ in sample(toy_tile(toy_net), walks(*lengths), told.append):
        taken.append(len(told))

    assert told[:2] == [6, 13]
    assert told == sorted(told)
    assert (len(told), told[-1]) == (taken[-1], sum(lengths) - len(lengths))


def test_what_a_step_raises_when_told_ends_the_drawing(toy_net: nn.Module) -> None:
    def stop(done: int) -> None:
        if done >= 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        list(sample(toy_tile(toy_net), walks(9), stop))


def test_the_tile_is_the_plain_loop(toy_net: nn.Module) -> None:
    """Start, four steps with the noise of (seed, step, index), finish."""
    draw = Draw(request=Walk(seed=5, steps=4), index=3)
    sampler = TOY.tasks["walk"](ToySpec(dataset="ds_" + "0" * 32, model="toy"), DATA)
    noise = [Noise.of_step(Domain.SAMPLING, 5, step, range(3, 4), CPU) for step in range(4)]
    state = sampler.start([draw], noise[0])
    for step in range(4):
        state = sampler.step(toy_net, state, noise[step])

    [(_, sampled)] = sample(toy_tile(toy_net), [draw])

    # A tile is wider, and other shapes have other kernels.
    assert torch.allclose(sampled, sampler.finish(toy_net, state)[0], atol=1e-5)


def test_an_evicted_sample_frees_its_slot_for_another(toy_net: nn.Module) -> None:
    tile = toy_tile(toy_net)
    tile.admit(walks(5, 6))

    tile.step()
    tile.evict(lambda draw: draw.request.steps == 5)
    tile.admit(walks(2)[:1])

    assert tile.num_free == tile.width - 2
    assert [draw.request.steps for _ in range(5) for draw, _ in tile.step()] == [2, 6]


def test_a_draw_that_cannot_begin_loses_none_behind_it(toy_net: nn.Module) -> None:
    line: Line[Walk] = Line(toy_tile(toy_net))
    bad = Draw(request=Walk.model_construct(seed="not a number", steps=3), index=0)
    good = walks(3, 3)
    line.add([good[0], bad, good[1]])

    with pytest.raises((TypeError, ValueError)):
        line.step()
    assert {id(draw) for draw in line.draws} == {id(good[0]), id(bad), id(good[1])}

    line.evict(lambda draw: draw is bad)
    done = [draw for _ in range(4) for draw, _ in line.step()]
    assert {id(draw) for draw in done} == {id(draw) for draw in good}


def owned(owner: str, num_draws: int, *, steps: int = 2, seed: int = 4) -> list[Draw[Walk]]:
    request = Walk(seed=seed, steps=steps)
    return [Draw(request=request, index=index, owner=owner) for index in range(num_draws)]


def done_in_order(line: Line[Walk]) -> list[tuple[Any, torch.Tensor]]:
    done: list[tuple[Any, torch.Tensor]] = []
    while not line.is_empty:
        done += [(draw.owner, sampled) for draw, sampled in line.step() if sampled is not None]
    return done


@pytest.mark.parametrize("width", [1, 8])
def test_who_wants_one_sample_does_not_wait_for_who_wants_hundreds(toy_net: nn.Module, width: int) -> None:
    [(_, alone)] = done_in_order(line_of(toy_net, width, owned("small", 1, seed=7)))
    line = line_of(toy_net, width, owned("large", 200))
    for _ in range(3):
        line.step()

    line.add(owned("small", 1, seed=7))
    done = done_in_order(line)

    [place] = [place for place, (owner, _) in enumerate(done) if owner == "small"]
    assert place <= 2 * width
    assert torch.equal(done[place][1], alone)


@pytest.mark.parametrize("width", [1, 2, 8])
def test_owners_have_equally_many_slots_whoever_wants_more(toy_net: nn.Module, width: int) -> None:
    line = line_of(toy_net, width, [*owned("a", 90), *owned("b", 30), *owned("c", 30)])

    first = [owner for owner, _ in done_in_order(line)][:60]

    assert all(18 <= first.count(owner) <= 22 for owner in "abc")


def test_long_samples_take_no_more_slots_than_short_ones(toy_net: nn.Module) -> None:
    line = line_of(toy_net, 8, [*owned("long", 50, steps=40), *owned("short", 200, steps=1)])

    done = [draw.owner for _ in range(30) for draw, _ in line.step()]

    assert done == ["short"] * 4 * 30


def test_an_owner_is_asked_in_as_long_as_a_share_is_left(toy_net: nn.Module) -> None:
    line = line_of(toy_net, 8, owned("a", 2))
    rooms = [line.room]
    line.add(owned("a", 100))
    for owner in "bcdefgh":
        rooms.append(line.room)
        line.add(owned(owner, 100))

    assert rooms == [6, 4, 2, 2, 1, 1, 1, 1]
    assert line.room == 0
    assert line_of(toy_net, 1, owned("a", 100)).room == 1


def line_of(net: nn.Module, width: int, draws: list[Draw[Walk]]) -> Line[Walk]:
    line = Line(Tile(net, toy_tile(net).sampler, draws[0], CPU, width))
    line.add(draws)
    return line


def test_a_tile_refuses_more_than_it_holds(toy_net: nn.Module) -> None:
    tile = toy_tile(toy_net)

    with pytest.raises(ValueError, match="do not fit"):
        tile.admit(walks(*[1] * (tile.width + 1)))


def test_a_network_whose_tensors_do_not_divide_gets_a_tile_of_one() -> None:
    widths = [tile_of(net_of(data), draws_of(0), data).width for data in (DATA, ODD)]

    assert widths == [8, 1]


@pytest.mark.parametrize(("features", "width"), [(16, 8), (1530, 1), (1536, 8), (3, 1), (1, 8)])
def test_a_tile_is_wide_where_whole_vectors_hide_nothing(features: int, width: int) -> None:
    assert widest(lambda slots: torch.zeros(slots, features).sigmoid(), CPU) == width


def test_exactly_rounded_arithmetic_allows_any_width() -> None:
    assert widest(lambda slots: (torch.zeros(slots, 1530) * 2 + 1).sqrt(), CPU) == 8


def test_two_threads_must_both_end_on_a_whole_vector() -> None:
    torch.set_num_threads(2)
    elements = 2 * 32_768 + 64

    assert widest(lambda _: torch.zeros(elements).sigmoid(), CPU) == 1
    assert widest(lambda _: torch.zeros(elements + 64).sigmoid(), CPU) == 8


def test_the_cache_drops_the_longest_unused_network() -> None:
    cache = ModelCache(limit_bytes=2 * size_bytes(nn.Linear(4, 4)))
    for key in "abac":
        cache.take(key, lambda: nn.Linear(4, 4))
        cache.give_back(key)

    assert ["a" in cache, "b" in cache, "c" in cache] == [True, False, True]


def test_the_cache_takes_a_share_of_the_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was free before the first network was loaded, whatever is free later."""
    net = nn.Linear(4, 4)
    left = [3 * size_bytes(net)]
    monkeypatch.setattr(models, "room", lambda device: left[0])
    cache = ModelCache()

    cache.take("a", lambda: net)
    left[0] = 0
    cache.give_back("a")

    assert cache.limit_bytes == size_bytes(net)
    assert "a" in cache


def test_the_cache_loads_a_network_once() -> None:
    cache = ModelCache()

    assert cache.take("a", lambda: nn.Linear(4, 4)) is cache.take("a", lambda: nn.Linear(4, 4))


def test_a_network_larger_than_the_cache_still_runs() -> None:
    cache = ModelCache(limit_bytes=1)
    cache.take("a", lambda: nn.Linear(4, 4))
    cache.give_back("a")

    assert cache.take("b", lambda: nn.Linear(4, 4)) is not None
    assert ["a" in cache, "b" in cache] == [False, True]


def test_a_network_in_use_is_not_dropped() -> None:
    """By any number of users: until the last has given it back, it is not loaded a second time beside itself."""
    cache = ModelCache(limit_bytes=1)
    used = [cache.take("a", lambda: nn.Linear(4, 4)) for _ in range(2)]

    cache.give_back("a")
    cache.take("b", lambda: nn.Linear(4, 4))
    cache.drop_unused()

    assert cache.take("a", lambda: nn.Linear(4, 4)) is used[0]


def test_a_network_that_could_not_be_dropped_in_use_is_dropped_afterwards() -> None:
    cache = ModelCache(limit_bytes=1)
    for key in "ab":
        cache.take(key, lambda: nn.Linear(4, 4))

    for key in "ab":
        cache.give_back(key)

    assert ["a" in cache, "b" in cache] == [False, True]


def test_the_toy_sampler_is_a_sampler() -> None:
    assert Walker(ToySpec(dataset="ds_" + "0" * 32, model="toy"), DATA).num_steps(Walk(steps=4)) == 4
