"""All that is measured on a GPU, in one call, with torch, numpy, safetensors and pydantic; with Triton and diffusers
where they are there.

Writes JSON after each part, and prints a table last. A part that breaks is told of by its error. On a machine without
GPU ``--tiny`` shows that everything runs; its figures mean nothing.

    python -m bench.device --out bench/results/device.json [--only kernels,unet] [--minutes 8.5] [--tiny]
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from bench.device_parts import Bench
from bench.device_sampling import one_batch, shared_steps
from bench.device_training import dit_training, gan_training, unet_training
from bench.kernels import group_norms, noises, optimizers
from bench.limits import Ceilings
from bench.timing import OUT_OF_TIME, Clock, described
from worker.engine.numerics import exact, fingerprint

PARTS: Final[Mapping[str, Callable[[Bench], None]]] = {
    "noise": noises,
    "group_norm": group_norms,
    "optimizer": optimizers,
    "dcgan": gan_training,
    "shared_steps": shared_steps,
    "ddim": one_batch,
    "unet": unet_training,
    "dit": dit_training,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--only", default=",".join(PARTS), help="names of parts, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant is timed")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing new begins")
    parser.add_argument("--tiny", action="store_true", help="to try it out: tiny networks, nothing compiled")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.monotonic() + 60 * options.minutes
    block_seconds = 0.0 if options.tiny else 0.3
    clock = Clock(device=device, rounds=options.rounds, block_seconds=block_seconds, deadline=deadline)
    with exact():  # before the first product: what cuBLAS has been told by then is what the engine finds
        pass
    bench = Bench(clock=clock, ceilings=Ceilings.measure(clock, tiny=options.tiny), is_tiny=options.tiny)
    seconds: dict[str, float] = {}
    for name in options.only.split(","):
        began = time.monotonic()
        run(name, PARTS[name], bench)
        seconds[name] = round(time.monotonic() - began, 1)
        options.out.write_text(json.dumps(report(bench, seconds), indent=2) + "\n")
        print(f"{name}: {seconds[name]} s", flush=True)
    print(table(bench.rows))


def run(name: str, part: Callable[[Bench], None], bench: Bench) -> None:
    """Run a part; what it raises becomes a row."""
    if bench.clock.is_over:
        bench.refuse(name, "", OUT_OF_TIME)
        return
    try:
        part(bench)
    except Exception as error:  # noqa: BLE001 - one broken part does not take the others down
        bench.refuse(name, "", described(error))
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def report(bench: Bench, seconds: Mapping[str, float]) -> dict[str, Any]:
    """All that was found, and where."""
    return {
        "machine": fingerprint(bench.device) | {"python": platform.python_version(), "system": platform.platform()},
        "versions": {name: _version(name) for name in ("torch", "triton", "diffusers", "pydantic")},
        "tiny": bench.is_tiny,
        "ceilings": {
            "flops_per_second": bench.ceilings.flops_per_second,
            "bytes_per_second": bench.ceilings.bytes_per_second,
        },
        "seconds_of_parts": dict(seconds),
        "rows": bench.rows,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, case by case; a case's first contestant is what the others are compared with."""
    lines: list[str] = []
    case, first = ("", ""), 0.0
    for row in rows:
        if case != (row["part"], row["case"]):
            case, first = (row["part"], row["case"]), row.get("seconds", 0.0)
            lines.append(f"{' '.join(case):50}{'ms':>9}{'low':>9}{'high':>9}{'times':>7}{'limit':>7}{'matrix':>7}")
        if "seconds" in row:
            first = first or row["seconds"]
            lines.append(f"  {row['contestant']:48}{_figures(row, first)}")
        else:
            lines.append(f"  {row['contestant']}: {row.get('error') or _found(row['checks'])}")
    return "\n".join(lines)


def _figures(row: Mapping[str, Any], first: float) -> str:
    times = "".join(f"{1000 * row[name]:9.4g}" for name in ("seconds", "low", "high"))
    shares = (f"{row[name]:7.1%}" if name in row else "" for name in ("share_of_limit", "share_of_matrix_rate"))
    return f"{times}{first / row['seconds']:7.2f}{''.join(shares)}"


def _found(checks: Mapping[str, float | bool]) -> str:
    return ", ".join(f"{name} {found if isinstance(found, bool) else f'{found:.1e}'}" for name, found in checks.items())


if __name__ == "__main__":
    main()
