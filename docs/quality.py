"""Prints docs/quality.md from what ``bench.quality`` wrote: ``python docs/quality.py > docs/quality.md``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = REPOSITORY / "bench/results/quality"

HEAD = """# What the families reach

Small models, trained for minutes on two CPU cores on the first 8,000 of MNIST's test digits and judged against the last
2,000 by the shipped classifier (99 % of held-out digits right; [metrics.md](metrics.md)). *way* is 0 where samples are
as far from the held-out digits as training digits are, and 1 where they are as far as noise with each pixel's mean and
deviation (Fréchet distance of 64 features). `python -m bench.quality` trains and measures; this page is generated from
its results by `docs/quality.py`, and a test compares the two. Nothing is chosen by hand: sheets show the first 64
samples.

Training is asked to take four minutes at most of a quiet machine with two cores, which is 480 CPU seconds. Those told
were taken on a machine with neighbours; of newer results they are twenty times the lower quartile of a training's
twentieths, which leaves out what slowed down some of them, but not what slowed down all.
"""

TRIED: Final = """## Tried for what is not reached

* **R3GAN's own network** (`r3gan-own-network`). Its step goes into grouped convolutions and their double backward
  pass, so in the time it sees a third of the images that its objective sees with DCGAN's network (`r3gan`).
* **The time of `vae-conv` and `consistency`.** They were measured on a processor without bf16 (AVX2), where all is
  computed in fp32; `vae-conv`, without `augmentation`, took 396 CPU seconds on one that has it.
"""

NAMES: Final[Mapping[str, str]] = {
    "loss": "-ELBO, nats per image",
    "way": "way",
    "probe_accuracy": "accuracy of a linear probe on latents",
    "num_classes_seen": "classes among the samples",
    "largest_class": "share of the commonest class",
    "guided_class_accuracy": "samples of the class asked for, at guidance 2",
    "inpainting_lower_gain": "inpainting the lower half: dB over principal components",
    "inpainting_scattered_gain": "inpainting half of the pixels: dB over principal components",
    "super_resolution_gain": "super-resolution, 4x: dB over bicubic",
    "inpainted_lower_class_accuracy": "digits of the right class, lower half inpainted",
    "inpainted_scattered_class_accuracy": "digits of the right class, half of the pixels inpainted",
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


def rows(results: list[Mapping[str, Any]]) -> Iterator[str]:
    """A row for each figure that something was asked of."""
    for result in results:
        seconds = result["seconds"]
        for asked in result["asked"]:
            sense = "at_most" if "at_most" in asked else "at_least"
            sign = "≤" if sense == "at_most" else "≥"
            reached = "yes" if asked["reached"] else "**no**"
            figure = asked["figure"]
            yield (
                f"| {result['case']} | {NAMES[figure]} | {sign} {number(asked[sense])} | "
                f"{number(result['figures'][figure])} | {reached} | {result['spec']['steps']} | "
                f"{seconds.get('training_cpu_undisturbed', seconds['training_cpu']):.0f} | "
                f"{result['machine']['instructions']} |"
            )


def sheets(results: list[Mapping[str, Any]]) -> Iterator[str]:
    """The pictures of each case."""
    for result in results:
        if result["sheets"]:
            pictures = " ".join(f"![{name}](../bench/results/quality/{name})" for name in result["sheets"])
            yield f"### {result['case']}\n\n{pictures}"


def render() -> str:
    """The page."""
    results = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    machines = {f"{one['machine']['device']}, torch {one['machine']['torch']}" for one in results}
    table = [
        "| case | figure | asked | reached | | steps | CPU seconds of training | on |",
        "|---|---|---|---|---|---|---|---|",
        *rows(results),
    ]
    measured = f"Measured on {'; '.join(sorted(machines))}."
    parts = [HEAD, "\n".join(table), measured, TRIED, "## Samples", *sheets(results)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    print(render(), end="")
