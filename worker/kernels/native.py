"""Kernels in C++ for CPUs: `cpu.cpp`, compiled for the processor at hand when it is first needed, and kept.

Without a compiler there are none, and callers use plain torch, which gives the same up to rounding. Knows no network.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

SOURCE: Final = Path(__file__).with_name("cpu.cpp")
FLAGS: Final = (
    *("-std=c++17", "-O2", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wno-psabi"),
)
# Threads are those of torch: its own OpenMP is in the process already, and a second one would fight with it.
LINK_FLAGS: Final = ("-shared", "-nostdlib")
PATIENCE: Final = 300
"""Seconds that a compilation may take, on a machine that does much else besides."""
CHANNELS: Final = 16
"""Channels come in whole vectors of so many (LANES in the source)."""
PIXELS: Final = 64
"""Pixels of a block that is summed up on its own (PIXELS in the source)."""
KINDS: Final = {torch.float32: 0, torch.bfloat16: 1}
SILU: Final = 2

logger = logging.getLogger(__name__)


def is_available() -> bool:
    """Whether there are such kernels; compiles them the first time, which takes seconds."""
    return _library() is not None


def group_norm(
    x_BCHW: Tensor, shift_BC: Tensor | None, gamma_C: Tensor, beta_C: Tensor, *, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """Group normalisation of ``x + shift``, and SiLU of it where asked for; and the statistics that backward needs.

    ``x`` is dense in NHWC, float32 or bfloat16; the others are float32 and dense.
    """
    y_BCHW = torch.empty_like(x_BCHW)
    stats_B2G = torch.empty(len(x_BCHW), 2, num_groups)
    _call("group_norm", KINDS[x_BCHW.dtype] + SILU * silu, _shape(x_BCHW, num_groups), x_BCHW, shift_BC, gamma_C,
          beta_C, y_BCHW, stats_B2G, _room(x_BCHW), ctypes.c_float(eps))  # fmt: skip
    return y_BCHW, stats_B2G


def group_norm_backward(
    x_BCHW: Tensor, shift_BC: Tensor | None, gamma_C: Tensor, beta_C: Tensor, stats_B2G: Tensor, dy_BCHW: Tensor,
    *, silu: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The slopes by ``x``, ``shift``, ``gamma`` and ``beta``; ``dy`` is as ``x`` is."""
    dx_BCHW = torch.empty_like(x_BCHW)
    dshift_BC = None if shift_BC is None else torch.empty_like(shift_BC)
    of_samples_B2C = torch.empty(len(x_BCHW), 2, len(gamma_C))
    _call("group_norm_backward", KINDS[x_BCHW.dtype] + SILU * silu, _shape(x_BCHW, stats_B2G.shape[2]), x_BCHW,
          shift_BC, gamma_C, beta_C, stats_B2G, _room(x_BCHW), dy_BCHW, dx_BCHW, of_samples_B2C, dshift_BC)  # fmt: skip
    dgamma_C, dbeta_C = of_samples_B2C.sum(0)
    return dx_BCHW, dshift_BC, dgamma_C, dbeta_C


def softmax(x_XN: Tensor, scale: float) -> Tensor:
    """``softmax(scale x)`` over the last axis; ``x`` is dense, float32 or bfloat16."""
    y_XN = torch.empty_like(x_XN)
    _call("softmax", KINDS[x_XN.dtype], *_rows(x_XN), x_XN, ctypes.c_float(scale), y_XN)
    return y_XN


def softmax_backward(y_XN: Tensor, dy_XN: Tensor, scale: float) -> Tensor:
    """The slope by ``x``; both are as ``x`` is."""
    dx_XN = torch.empty_like(y_XN)
    _call("softmax_backward", KINDS[y_XN.dtype], *_rows(y_XN), y_XN, dy_XN, ctypes.c_float(scale), dx_XN)
    return dx_XN


def _shape(x_BCHW: Tensor, num_groups: int) -> Any:
    num, channels, height, width = x_BCHW.shape
    return (ctypes.c_long * 4)(num, height * width, channels, num_groups)


def _room(x_BCHW: Tensor) -> Tensor:
    """For partial sums (``rows()`` in the source)."""
    num, channels, height, width = x_BCHW.shape
    return torch.empty(num * (3 * -(-height * width // PIXELS) + 5) * channels)


def _rows(x_XN: Tensor) -> Sequence[ctypes.c_long]:
    length = x_XN.shape[-1]
    return ctypes.c_long(x_XN.numel() // max(length, 1)), ctypes.c_long(length)


def _call(name: str, kind: int, *arguments: Any) -> None:
    """Call a kernel with as many threads as torch uses; tensors are passed by address."""
    pointers = [
        ctypes.c_void_p(None if one is None else one.data_ptr()) if one is None or isinstance(one, Tensor) else one
        for one in arguments
    ]
    getattr(_library(), name)(kind, *pointers, torch.get_num_threads())


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", b"") or b""
        logger.warning("kernels for the CPU could not be compiled: %s %s", error, said.decode(errors="replace"))
        return None


def _compiled(compiler: str) -> Path:
    """The library, of this source, for this processor; compiled unless it was before."""
    origin = "\n".join((SOURCE.read_text("utf-8"), compiler, *FLAGS, *LINK_FLAGS, *_processor()))
    name = f"noisemill-{hashlib.sha256(origin.encode()).hexdigest()[:16]}.so"
    folder = _folder()
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unlinked, unfinished = Path(scratch) / "cpu.o", Path(scratch) / name
            for arguments in ([*FLAGS, "-c", SOURCE, "-o", unlinked], [*LINK_FLAGS, unlinked, "-o", unfinished]):
                subprocess.run([compiler, *arguments], check=True, capture_output=True, timeout=PATIENCE)
            unfinished.replace(folder / name)
    return folder / name


def _folder() -> Path:
    """Where compiled libraries are kept: the user's cache, or for this process alone where there is none."""
    folder = Path.home() / ".cache" / "noisemill"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(_own_folder().name)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="noisemill-")


def _processor() -> list[str]:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return [platform.machine()]
    return [
        platform.machine(),
        *sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}),
    ]


if __name__ == "__main__":
    raise SystemExit(0 if is_available() else 1)
