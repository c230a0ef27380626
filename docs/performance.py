"""Prints docs/performance.md from what the benches wrote: ``python docs/performance.py > docs/performance.md``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = REPOSITORY / "bench/results"

HEAD = """# How fast it is

Every figure is a ratio of medians, or a median: all sides did the same work in the same run and took turns, in another
order each round. No test depends on a time. This page is generated from `bench/results` by `docs/performance.py`, and
a test compares the two; what was not reached stands here as it is. How to run a bench is said at its head.
"""

SECTIONS: Final = (
    ("unet/cpu.json", "Training and drawing with a UNet of 6.5 million parameters (`bench/unet.py`)"),
    ("serving/cpu.json", "Requests that share a tile (`bench/serving.py`)"),
    ("families/cpu.json", "Other families (`bench/families.py`)"),
    ("control_plane/control_plane.json", "Submitting, starting and ending jobs (`bench/control_plane.py`)"),
    ("device/device.json", "On a GPU (`bench/device.py`)"),
)


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
    yield "| figure | asked | measured | |"
    yield "|---|---|---|---|"
    for one in asked(report):
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
        parts.append(f"## {title}\n\n" + "\n".join([*verdicts(report), *contestants(report)]))
        parts.append(f"Measured on: {', '.join(told)}.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(render(), end="")
