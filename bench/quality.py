"""Train models on handwritten digits within minutes, and see how good what they draw is.

Each case of ``bench/quality_cases.py`` is trained with the engine's trainer on the first 8,000 of MNIST's test digits,
drawn from through the engine's tile, and judged against the last 2,000 in the features of the shipped classifier.
Writes a JSON per case with every figure, what was asked and whether it was reached, and beside it sheets of 8 x 8
samples. ``docs/quality.py`` makes a page of them.

    python -m bench.quality --data FOLDER --only vae-mlp,vae-conv --out bench/results/quality
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from bench.digits import Digits, read_digits
from bench.quality_cases import CASES, LONGEST, Case, device
from bench.quality_parts import Judge, Trained
from worker.engine.numerics import exact, fingerprint
from worker.jobs.pictures import encode_png, sheet

SHEET: Final = 64


def run(name: str, case: Case, digits: Digits, out: Path) -> dict[str, Any]:
    """Train and measure one case; writes its sheets into the folder ``out``."""
    load = os.getloadavg()[0]
    trained = case.train(case.spec, digits, device())
    began = time.perf_counter()
    figures = dict(case.measure(trained, Judge(digits)))
    measuring = time.perf_counter() - began
    return {
        "seconds": {
            "training": round(trained.seconds, 1),
            "training_cpu": round(trained.cpu_seconds, 1),
            "training_cpu_undisturbed": round(trained.quiet_cpu_seconds, 1),
            "measuring": round(measuring, 1),
        },
        "within_time": trained.seconds <= LONGEST,
        "load": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
        "num_parameters": trained.trainer.num_parameters,
        "figures": {figure: rounded(value) for figure, value in figures.items()},
        "asked": [
            {"figure": asked.figure, asked.sense: asked.bound, "reached": asked.reached(figures)}
            for asked in case.asked
        ],
        "reached": all(asked.reached(figures) for asked in case.asked),
        "sheets": write_sheets(name, trained, out),
        "spec": case.spec.model_dump(mode="json", exclude={"dataset", "model"}),
        "numerics": trained.trainer.numerics.as_json(),
    }


def rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_sheets(name: str, trained: Trained, out: Path) -> list[str]:
    """The first samples of each kind as PNG; returns the files' names."""
    names: list[str] = []
    for kind, images in trained.samples.items():
        path = out / f"{name}-{kind}.png"
        path.write_bytes(encode_png(sheet(images[:SHEET].numpy(), columns=min(8, len(images)))))
        names.append(path.name)
    return names


def machine() -> Mapping[str, Any]:
    return {
        **fingerprint(device()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the idx files")
    parser.add_argument("--only", default=",".join(CASES), help="names of cases, separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files and sheets")
    parser.add_argument("--steps", type=int, help="train so many steps instead: to try a case out, not to judge it")
    parser.add_argument("--threads", type=int, help="threads of torch; all cores when left out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    digits = read_digits(options.data)
    with exact(options.threads):
        for name in options.only.split(","):
            case = CASES[name]
            if options.steps is not None:
                shortened = case.spec.model_copy(update={"steps": options.steps, "warmup_steps": None})
                case = replace(case, spec=shortened)
            result = run(name, case, digits, options.out)
            report = {"case": name, "machine": machine(), "shortened": options.steps is not None, **result}
            (options.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
            print(name, json.dumps(result["figures"]), flush=True)


if __name__ == "__main__":
    main()
