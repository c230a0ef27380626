"""Each kernel of ``worker/kernels`` on a GPU: first whether it is right there, then against torch and its compiler.

Contestants are the plain operations, the same compiled, and Triton's kernel; each also as a captured graph's replay,
where what counts is the device alone. On a CPU without Triton there is only the first.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from bench.device_parts import Bench
from bench.limits import Work
from bench.timing import Maker, Step
from worker.kernels import adamw, dispatch, philox
from worker.kernels.adamw import Flat
from worker.kernels.choice import is_triton_installed
from worker.kernels.dispatch import group_norm_silu
from worker.kernels.group_norm import Modulation, Norm, plain
from worker.kernels.noise import Domain, Noise

PLAIN, COMPILED, TRITON = "torch", "torch.compile", "Triton"
UNCAPTURED: Final = {"noise": (PLAIN, COMPILED)}
"""Ways that cannot be captured, by part: plain noise copies a number from main memory."""
EPS: Final = 1e-6
IMAGES: Final = ((128, 128, 32, 32), (128, 256, 16, 16), (128, 256, 4, 4), (8, 128, 32, 32), (1, 128, 32, 32))
"""Of UNet-b, where it has most to normalise and where least."""
COMPILED_AT: Final = (IMAGES[0], IMAGES[3])
"""Where the compiler takes part, as it needs seconds for each shape."""

Way = Callable[..., Any]


def contest(bench: Bench, case: tuple[str, str], ways: Mapping[str, Way], given: tuple[Any, ...], work: Work) -> None:
    """Time each way of doing a kernel's work on what is ``given``, called and replayed."""
    makers: dict[str, Maker] = {}
    for name, way in ways.items():
        makers[name] = lambda way=way: lambda: way(*given)
        if bench.device.type == "cuda" and name not in UNCAPTURED.get(case[0], ()):
            makers[f"{name}, replayed"] = lambda way=way: replay(lambda: way(*given))
    bench.record(*case, bench.clock.compete(makers), work)


def replay(step: Step) -> Step:
    """The step as a captured graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def check(bench: Bench, part: str, case: str, compare: Callable[[], dict[str, float | bool]]) -> None:
    """A row of what was found, instead of seconds."""
    row: dict[str, Any] = {"part": part, "case": case, "contestant": "checks"}
    bench.rows.append(row | {"checks": compare()})


def variants(bench: Bench, plainly: Way, fused: Way, *, compiled: bool = True) -> dict[str, Way]:
    """Those of the three ways that there are here."""
    found = {PLAIN: plainly}
    if bench.compiles and compiled:
        found[COMPILED] = torch.compile(plainly, dynamic=False)
    if bench.device.type == "cuda" and is_triton_installed():
        found[TRITON] = fused
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


# Group normalisation -----------------------------------------------------------------------------


def group_norms(bench: Bench) -> None:
    """Forward alone, and forward with backward; with a shift and scale, in bfloat16."""
    shapes = ((2, 16, 4, 4),) if bench.is_tiny else IMAGES
    for shape in shapes:
        x, norm, modulation, dy = _images(shape, bench.device)
        check(bench, "group norm", str(shape), lambda given=(x, norm, modulation, dy): _norm_checks(*given))
        num = x.numel()
        work = Work(flops=0, num_bytes=2 * 2 * num)
        ways = variants(bench, plain, group_norm_silu, compiled=shape in COMPILED_AT)
        with torch.no_grad():
            contest(bench, ("group norm, forward", str(shape)), ways, (x, norm, modulation), work)
        both = {name: _with_slopes(way) for name, way in ways.items()}
        work = Work(flops=0, num_bytes=2 * 5 * num)
        contest(bench, ("group norm, both ways", str(shape)), both, (x, norm, modulation, dy), work)


def _images(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Norm, Modulation, Tensor]:
    batch, channels = shape[:2]
    x, dy = (
        torch.randn(shape, device=device).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    weight, bias = (torch.randn(channels, device=device).requires_grad_() for _ in range(2))
    scale, shift = (torch.randn(batch, channels, device=device).requires_grad_() for _ in range(2))
    groups = min(32, channels // 4)
    return x.requires_grad_(), Norm(weight, bias, groups, EPS), Modulation(scale, shift), dy


def _with_slopes(way: Callable[..., Tensor]) -> Way:
    def both(x: Tensor, norm: Norm, modulation: Modulation, dy: Tensor) -> tuple[Tensor, ...]:
        y = way(x, norm, modulation)
        return y, *torch.autograd.grad(y, (x, norm.weight_C, norm.bias_C, *modulation), dy)

    return both


def _norm_checks(x: Tensor, norm: Norm, modulation: Modulation, dy: Tensor) -> dict[str, float | bool]:
    once, again = (_with_slopes(group_norm_silu)(x, norm, modulation, dy) for _ in range(2))
    wide = [each.detach().double().requires_grad_() for each in (x, norm.weight_C, norm.bias_C, *modulation)]
    exactly = _with_slopes(plain)(
        wide[0], norm._replace(weight_C=wide[1], bias_C=wide[2]), Modulation(*wide[3:]), dy.double()
    )
    alone = group_norm_silu(x[-1:], norm, Modulation(*(each[-1:] for each in modulation)))
    names = ("y", "dx", "dweight", "dbias", "dscale", "dshift")
    return {
        **{name: distance(*pair) for name, *pair in zip(names, once, exactly, strict=True)},
        "repeats to the bit": all(map(torch.equal, once, again)),
        "alone as among others": torch.equal(alone, once[0][-1:]),
    }


# Optimizer ---------------------------------------------------------------------------------------


def optimizers(bench: Bench) -> None:
    """A step of 35.7 million weights: in one pass, and by torch's parts over as many tensors as UNet-b has."""
    num = 10_000 if bench.is_tiny else 35_700_000
    told = adamw.rates(5, learning_rate=1e-4, betas=(0.9, 0.99), weight_decay=0.01, ema_decay=0.999, clip=1.0).to(
        bench.device
    )
    check(bench, "optimizer", f"{num} weights", lambda: _optimizer_checks(_flat(num, bench.device), told))
    work = Work(flops=0, num_bytes=38 * num)
    ways = variants(bench, adamw.plain, dispatch.descend)
    contest(bench, ("optimizer", f"{num} weights"), ways, (_flat(num, bench.device), told), work)
    makers = {"torch's fused parts": lambda: _by_parts(num, bench.device)}
    bench.record("optimizer", f"{num} weights", bench.clock.compete(makers), work)


def _flat(num: int, device: torch.device) -> Flat:
    weights = torch.randn(num, device=device)
    return Flat(
        weight_P=weights,
        grad_P=torch.randn_like(weights),
        mean_P=torch.zeros_like(weights),
        square_P=torch.ones_like(weights),
        average_P=weights.clone(),
        rounded_P=weights.bfloat16(),
        num_decayed=num - 1000,
    )


def _by_parts(num: int, device: torch.device, num_tensors: int = 270) -> Step:
    weights: list[Tensor] = [nn.Parameter(part.clone()) for part in torch.randn(num, device=device).chunk(num_tensors)]
    averages = [weight.detach().clone() for weight in weights]
    rounded = [weight.detach().bfloat16() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, fused=True)
    for weight in weights:
        weight.grad = torch.randn_like(weight)

    @torch.no_grad()
    def step() -> None:
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, weights, 1e-3)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(rounded, weights)  # pyright: ignore[reportPrivateImportUsage]

    return step


def _optimizer_checks(flat: Flat, told: Tensor) -> dict[str, float | bool]:
    names = [field.name for field in fields(Flat) if field.name.endswith("_P")]
    once, again, plainly = (replace(flat, **{name: getattr(flat, name).clone() for name in names}) for _ in range(3))
    norms = dispatch.descend(once, told), dispatch.descend(again, told), adamw.plain(plainly, told)
    return {
        **{name: distance(getattr(once, name), getattr(plainly, name)) for name in names},
        "norm": distance(norms[0], norms[2]),
        "repeats to the bit": torch.equal(*norms[:2]) and torch.equal(once.weight_P, again.weight_P),
    }


# Noise -------------------------------------------------------------------------------------------


def noises(bench: Bench) -> None:
    """Normals of one step, every row with a seed of its own."""
    cases = ((2, 48),) if bench.is_tiny else ((64, 3 * 32 * 32), (512, 3 * 64 * 64))
    for rows, num in cases:
        seeds = torch.arange(rows, device=bench.device) * 2**40 + 7
        step, index = torch.full_like(seeds, 3), torch.zeros_like(seeds)
        noise = Noise(domain=Domain.SAMPLING, seed_B=seeds, step_B=step, index_B=index)
        case = f"{rows} rows of {num}"
        check(bench, "noise", case, lambda noise=noise, num=num: _noise_checks(noise, num))
        ways = variants(bench, lambda noise, num: noise.normal(num), philox.normal)
        contest(bench, ("noise", case), ways, (noise, num), Work(flops=0, num_bytes=4 * rows * num))


def _noise_checks(noise: Noise, num: int) -> dict[str, float | bool]:
    cpu = torch.device("cpu")
    there = replace(noise, **{key: getattr(noise, key).to(cpu) for key in ("seed_B", "step_B", "index_B")})
    normals, expected = philox.normal(noise, num).to(cpu), there.normal(num)
    return {
        "words are those of the CPU": torch.equal(philox.bits(noise, num).to(cpu), there.bits(num)),
        "uniforms are those of the CPU": torch.equal(philox.uniform(noise, num).to(cpu), there.uniform(num)),
        "share of other normals": (normals != expected).float().mean().item(),
        "largest difference": (normals - expected).abs().max().item(),
        "repeats to the bit": torch.equal(philox.normal(noise, num).to(cpu), normals),
    }
