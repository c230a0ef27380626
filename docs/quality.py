"""Prints docs/quality.md from what ``bench.quality`` wrote: ``python docs/quality.py > docs/quality.md``.

``python docs/quality.py --scores`` writes the table of each family's scores into docs/models.md.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = REPOSITORY / "bench/results/quality"

MODELS: Final = REPOSITORY / "docs/models.md"
BLOCK: Final = re.compile(r"(<!-- scores: (\w+) -->\n).*?(<!-- end of scores -->)", re.DOTALL)
"""Where docs/models.md tells the scores of a family."""
MOST: Final = 480
"""CPU seconds: four minutes of two cores."""

HEAD = """# What the families reach

Small models, trained for minutes on a CPU on the first 8,000 of MNIST's test digits and judged against the last
2,000 by the shipped classifier (99 % of held-out digits right; [metrics.md](metrics.md)). *way* is 0 where samples are
as far from the held-out digits as training digits are, and 1 where they are as far as noise with each pixel's mean and
deviation (Fréchet distance of 64 features). `python -m bench.quality` trains and measures; this page is generated from
its results by `docs/quality.py`, and a test compares the two. Nothing is chosen by hand: sheets show the first 64
samples.

A training is asked to take four minutes at most of a quiet machine with two cores, which is 480 CPU seconds if both
work all the time. Most were recorded on one thread, beside other work: then the CPU seconds say what was computed, the
time on the wall says little, and that a second thread halves it has not been shown. Those of newer results are twenty
times the lower quartile of a training's twentieths, which leaves out what slowed down some of them, but not what slowed
down all.
"""

TRIED: Final = """## Tried for what is not reached

* **R3GAN's own network** (`r3gan-own-network`). Its step goes into grouped convolutions and their double backward
  pass. With a penalty at each fourth step, and a batch of 64 instead of 32, it sees 205,000 images in the time instead
  of 115,000, and the way is 21 % instead of 24 %; undisturbed, a step takes 0.108 s of one core. In `r3gan` its
  objective is on DCGAN's network, whose steps are as long and better used.
* **The time of trainings.** On a processor without bf16 (AVX2), where all is computed in float32, `vae-conv` took 814
  CPU seconds and came to the same figures, and `consistency` 861. A step of the UNet takes 0.10 s of one core with
  AVX512's bf16, 0.15 s on another one, and 0.26 s without.
* **Consistency tuning again.** The recorded figure is of one run, in float32. The same recipe came to 1.44 in bf16
  (268 CPU seconds) and to 1.42 in float32 (447) on another processor, beside a teacher of nearly the same distance:
  1.3 is reached by some runs of it, and not by all.
* **The lower half inpainted, against principal components.** Their number and how exactly they have to fit are chosen
  on training digits, and so chosen they are as good as this model's own best guess: from the errors of one draw and
  of the mean of sixteen follows that of the mean of all, which is 16.3 dB, and the components' is 16.0. No more draws
  can change that, and 1,000 steps more gained 0.3 dB. A single draw, which is what shows a digit, is 3 dB further
  off.
* **That a person reads every digit** of the first 64. Of the UNet's, guided, 62 (in the fourth row one has two strokes,
  in the sixth one is no digit), without guidance about 52; of other models fewer. What the recorded sheets show, stands
  below.
* **On a GPU.** None was at hand.
"""

NAMES: Final[Mapping[str, str]] = {
    "loss": "-ELBO, nats per image",
    "way": "way",
    "probe_accuracy": "accuracy of a linear probe on latents",
    "num_classes_seen": "classes among the samples",
    "largest_class": "share of the commonest class",
    "modes": "modes found of 25",
    "high_quality": "samples within three standard deviations of a mode",
    "guided_class_accuracy": "samples of the class asked for, at guidance 2",
    "inpainting_lower_gain_over_mean": "the lower half inpainted, mean of 16 draws: dB over the mean digit",
    "inpainting_scattered_gain_over_mean": "half of the pixels inpainted, mean of 16 draws: dB over the mean digit",
    "inpainting_lower_gain": "the lower half inpainted, mean of 16 draws: dB over principal components",
    "inpainting_scattered_gain": "half of the pixels inpainted, mean of 16 draws: dB over principal components",
    "one_inpainted_lower_gain": "the same, one draw",
    "one_inpainted_scattered_gain": "the same, one draw",
    "super_resolution_gain": "super-resolution, 4x, mean of 16 draws: dB over bicubic",
    "one_super_resolution_gain": "the same, one draw",
    "inpainted_lower_class_accuracy": "digits of the right class, the lower half inpainted, mean of 16 draws",
    "one_inpainted_lower_class_accuracy": "the same, one draw",
    "inpainted_scattered_class_accuracy": "digits of the right class, half of the pixels inpainted, mean of 16 draws",
    "one_inpainted_scattered_class_accuracy": "the same, one draw",
    "fd_over_teacher": "Fréchet distance of 2 steps over that of the teacher's 35 evaluations",
    "usage": "codes in use",
    "perplexity_share": "perplexity over codes",
    "grey_levels_off": "mean difference of a pixel from what it should be, grey levels",
    "class_kept": "digits that keep their class",
    "class_kept_back": "digits that keep their class on the way back",
    "thick_class_kept": "digits that keep their class, in the style of a thick one",
    "faded_class_kept": "digits that keep their class, in the style of a faded one",
    "thick_brightness_off": "mean brightness less that of the thick style, grey levels",
    "faded_brightness_off": "mean brightness less that of the faded style, grey levels",
}


def number(value: float) -> str:
    """Three or four digits."""
    return f"{value:.4g}"


def figures(result: Mapping[str, Any]) -> Iterator[str]:
    """What was asked, what it came to and whether that is reached, as cells of a row for each figure; beside what is of
    several draws, that of one."""
    found = result["figures"]
    for asked in result["asked"]:
        sense = "at_most" if "at_most" in asked else "at_least"
        sign = "≤" if sense == "at_most" else "≥"
        reached = "yes" if asked["reached"] else "**no**"
        figure = asked["figure"]
        yield f"{NAMES[figure]} | {sign} {number(asked[sense])} | {number(found[figure])} | {reached}"
        one = f"one_{figure.replace('inpainting', 'inpainted')}"
        if one in found:
            yield f"{NAMES[one]} | | {number(found[one])} | "


def rows(results: list[Mapping[str, Any]]) -> Iterator[str]:
    """The table of all cases; what it cost stands in a case's first row."""
    for result in results:
        seconds, machine = result["seconds"], result["machine"]
        cpu = seconds.get("training_cpu_undisturbed", seconds["training_cpu"])
        cost = f"{cpu:.0f}" if cpu <= MOST else f"**{cpu:.0f}**"
        about = f"{result['spec']['steps']} | {cost} | {machine['num_threads']} | {machine['instructions']}"
        for place, figure in enumerate(figures(result)):
            yield f"| {'' if place else result['case']} | {figure} | {' | | | ' if place else about} |"


def scored(text: str) -> str:
    """docs/models.md with the scores of each family."""
    results = recorded()

    def table(found: re.Match[str]) -> str:
        of_family = [one for one in results if one["spec"]["family"] == found[2]]
        lines = [f"| {one['case']} | {figure} |" for one in of_family for figure in figures(one)]
        return found[1] + "\n".join(
            ["| recorded | figure | asked | reached | |", "|---|---|---|---|---|", *lines, found[3]]
        )

    return BLOCK.sub(table, text)


def sheets(results: list[Mapping[str, Any]]) -> Iterator[str]:
    """The pictures of each case."""
    for result in results:
        if result["sheets"]:
            pictures = " ".join(f"![{name}](../bench/results/quality/{name})" for name in result["sheets"])
            yield f"### {result['case']}\n\n{pictures}"


def recorded() -> list[Mapping[str, Any]]:
    """All results."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def render() -> str:
    """The page."""
    results = recorded()
    machines = {f"{one['machine']['device']}, torch {one['machine']['torch']}" for one in results}
    table = [
        "| case | figure | asked | reached | | steps | CPU seconds of training | threads | on |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows(results),
    ]
    measured = f"Measured on {'; '.join(sorted(machines))}."
    parts = [HEAD, "\n".join(table), measured, TRIED, "## Samples", *sheets(results)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--scores"]:
        MODELS.write_text(scored(MODELS.read_text("utf-8")), "utf-8")
    else:
        print(render(), end="")
