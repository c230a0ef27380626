"""Prints docs/performance.md from what the benches wrote: ``python docs/performance.py > docs/performance.md``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = REPOSITORY / "bench/results"

HEAD = """# How fast it is

Every figure is a ratio of medians, or a median: all sides did the same work in the same run and took turns. No test
depends on a time. This page is generated from `bench/results` by `docs/performance.py`, and a test compares the two;
what was not reached stands here as it is. How to run a bench is said at its head.
"""

SECTIONS: Final = (
    ("unet/cpu.json", "Training and drawing with a UNet of 6.5 million parameters (`bench/unet.py`), with AMX"),
    ("unet/cpu-avx512.json", "The same with AVX512's bf16 products, in 50 steps and beside what is compiled"),
    ("unet/curves.json", "What bf16 costs a training (`bench/unet_curves.py`)"),
    ("serving/cpu.json", "Requests that share a tile (`bench/serving.py`)"),
    ("families/cpu.json", "Other families (`bench/families.py`)"),
    ("control_plane/control_plane.json", "Submitting, starting and ending jobs (`bench/control_plane.py`)"),
    ("device.json", "On a GPU (`bench/device.py`)"),
)

TRIED: Final[Mapping[str, str]] = {
    "unet/cpu.json": """
Recorded on a machine with other work (load 2.8 to 4.9), DDIM in 10 steps instead of the 50 that the bounds are meant
for, and without the peers that are compiled. What was tried for the rest: group normalisation with SiLU in C++, in
NHWC and both directions; softmax by whole vectors; SiLU's exponential and quotient by single instructions; AdamW in
one pass over all weights; bf16 weights with exact ones behind them; compiled blocks; convolutions as im2col and one
product, which were faster at 8 x 8 pixels only. The profile: a training step takes 0.64 s on one thread and 0.62 s on
two. Half of a forward pass is convolutions, at 0.36 TFLOP/s a core of the 0.63 that bare AMX products reach; oneDNN's
gradients of weights take 2 to 4 times as long as the forward convolution of the same shape, and they are the peers'
as well as ours.
""",
    "unet/cpu-avx512.json": """
All of the work that the bounds are meant for, on a machine that was quiet but for some moments (which the greatest
times show). The profile of a step of eight images on one thread: 73 % are oneDNN's convolutions, 8 % our group
normalisation, 7 % linear layers, 5 % products of attention. The peers' convolutions are the same ones: with all else
taken away, ours would be 1.4 times as fast as the best tuned. bf16 products are worth less here than with AMX, which
is why the default, in float32, is nearer, too.
""",
    "serving/cpu.json": """
With AVX512's bf16 products a step of eight images takes 3.6 times as long as a step of one: in a full tile an image
costs 0.45 of what it costs alone, and the tile is not full while the first arrive and the last end. 0.42 is out of
reach of any tile here, as the step is convolutions to three quarters and those of eight images are not cheaper than
that. The tile is of eight because it serves most; a narrower one would let a request alone pay less, and all others
more. In float32, on a processor without such products, it was 0.74, 0.71, 0.64, 1.16 and 4.7. Before all this was
recorded a fault had made the batch of one eight times slower (0.17 s a step instead of 0.02: its group normalisations
started new threads each), beside which the ratios looked like 0.20 and 0.03; they were not kept.
""",
    "families/cpu.json": """
Measured with AVX512's bf16 products. On a processor without them, where both sides compute the same convolutions of
oneDNN in float32, it was 0.98 and 1.04 times: our float32, above, shows what is not the products. The two UNets are of
different architectures; what a forward pass of each takes stands below.
""",
    "control_plane/control_plane.json": """
In a run an hour before it were 1.35 times as many submissions (995 and 736 a second) and a p99 of 52 ms. What was
tried, what a submission, a job that does nothing and a first sample are made of by now, and what each step gained:
[decision 24](decisions/0024-what-a-submission-costs.md) and [decision 25](decisions/0025-runners-are-forked.md). In
short: of the 1.5 ms of CPU that a submission takes of the API half are the event loop's, a third the thread's that
records, the rest the relay's and the look-ups', in Python and under one interpreter lock; load, API, PostgreSQL and
Valkey share the two cores.
""",
}


def asked(report: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the bench was asked for: figure, bound, value, and whether it is reached."""
    yield from report.get("asked", [])
    for part, found in report.items():
        for name, goal in found.get("goals", {}).items() if isinstance(found, dict) else ():
            value = found["ratios"][name]
            peer = f"the best tuned ({found['best_tuned']})" if name == "tuned" else "diffusers as it comes"
            yield {
                "figure": f"{part}: times as fast as {peer}",
                "at least": goal,
                "value": value,
                "reached": value >= goal,
            }


def verdicts(report: Mapping[str, Any]) -> Iterator[str]:
    found = [*asked(report)]
    yield from ["| figure | asked | measured | |", "|---|---|---|---|"] if found else []
    for one in found:
        bound = f"≤ {one['at most']:g}" if "at most" in one else f"≥ {one['at least']:g}"
        reached = "yes" if one["reached"] else "**no**"
        yield f"| {one['figure']} | {bound} | {one['value']:.3g} | {reached} |"


def contestants(report: Mapping[str, Any]) -> Iterator[str]:
    """Seconds of each that took part, where the bench tells of them so."""
    for part, found in {"all": report, **report}.items():
        seconds = found.get("seconds") if isinstance(found, dict) else None
        if isinstance(seconds, dict) and all("median" in one for one in seconds.values()):
            yield f"\n{part}, seconds (least to most):\n\n| | median | |\n|---|---|---|"
            for name, one in seconds.items():
                yield f"| {name} | {one['median']:.3f} | {one['least']:.3f} to {one['most']:.3f} |"


def curves(report: Mapping[str, Any]) -> Iterator[str]:
    """The losses of trainings of equal seeds in two precisions."""
    if "curves" not in report:
        return
    seeds = range(len(report["curves"]["fp32"]))
    yield "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |\n|---|" + "---|" * len(seeds)
    for precision, found in report["curves"].items():
        last = (f"{one['curve'][-1]:.4f}" for one in found)
        held_out = (f"{one['held_out']:.4f}" for one in found)
        yield f"| {precision}, loss of the last tenth | {' | '.join(last)} |"
        yield f"| {precision}, held-out loss of the average | {' | '.join(held_out)} |"
    sign = "less" if report["within_noise"] else "**not less**"
    difference = f"{report['bf16_less_fp32']:.5f}"
    yield f"\n{report['steps']} steps of preset `{report['preset']}`. bf16 less fp32 is {difference} on the"
    yield f"mean of what is held out, {sign} than the {report['between_seeds_of_fp32']:.5f} between seeds."


def cases(report: Mapping[str, Any]) -> Iterator[str]:
    """Each that took part in a case of ``bench/device.py``, compared with the first of its case."""
    first: dict[tuple[str, str], float] = {}
    rows = report.get("rows", [])
    if rows:
        yield "\n| part | case | | ms | times as fast | of the limit |\n|---|---|---|---|---|---|"
    for row in rows:
        told = f"| {row['part']} | {row['case']} | {row['contestant']} |"
        if "seconds" in row:
            times = first.setdefault((row["part"], row["case"]), row["seconds"]) / row["seconds"]
            share = f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""
            yield f"{told} {1000 * row['seconds']:.3g} | {times:.2f} | {share} |"
        else:
            yield f"{told} {row.get('error') or row['checks']} | | |"


def render() -> str:
    """The page."""
    parts = [HEAD.strip()]
    for name, title in SECTIONS:
        path = RESULTS / name
        if not path.exists():
            parts.append(f"## {title}\n\nNot measured yet.")
            continue
        report = json.loads(path.read_text("utf-8"))
        machine = report["machine"]
        told = [
            f"{key.replace('_', ' ')} {value}" for key, value in machine.items() if isinstance(value, str | int | float)
        ]
        parts.append(
            f"## {title}\n\n" + "\n".join([*verdicts(report), *curves(report), *contestants(report), *cases(report)])
        )
        parts += [TRIED[name].strip()] if name in TRIED else []
        parts.append(f"Measured on: {', '.join(told)}.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(render(), end="")
