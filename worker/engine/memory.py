"""Memory: how much there is, how to tell that it ran out, and how to keep or give back what can be."""

import gc
import resource
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
from torch import nn

_SIGNS: Final = (
    *("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc"),
    # A library's handle, and the scratch of a convolution: torch tries one algorithm after another, and tells only that
    # none was left.
    *("CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED", "unable to find an engine to execute this"),
)
"""How torch's allocators, CUDA's libraries and the C++ runtime say it where they raise a plain RuntimeError."""
_PROC: Final = Path("/proc")
_CGROUPS: Final = Path("/sys/fs/cgroup")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once might succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def recompute(net: nn.Module) -> None:
    """Let the blocks of a network that can compute their inner results again not keep them."""
    for module in net.modules():
        if hasattr(module, "recompute"):
            module.recompute = True  # pyright: ignore[reportArgumentType] (no tensor)


def release(device: torch.device) -> None:
    """Give back what nobody refers to; call it when the error, which refers to its frames, is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def room(device: torch.device) -> int | None:
    """Bytes that can still be taken on ``device``; None where nobody tells.

    In main memory that is the least of what the machine has left, what this process may map, and what the control
    groups that it is in (of a container, say) have left; pages of files that are merely cached count as free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min((*_of_machine(), *_of_process(), *_of_cgroups()), default=None) if device.type == "cpu" else None


def _of_machine() -> Iterator[int]:
    with suppress(OSError, KeyError):
        yield _numbers(_PROC / "meminfo")["MemAvailable:"] * 1024


def _of_process() -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError):
            mapped = int((_PROC / "self/statm").read_text().split()[0]) * resource.getpagesize()
            yield max(0, limit - mapped)


def _of_cgroups() -> Iterator[int]:
    """Of each group from our own to the root, by version 2 of the interface and by version 1."""
    with suppress(OSError):
        for line in (_PROC / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own = Path(path.lstrip("/"))
            for folder in (own, *own.parents):
                if not controllers:
                    yield from _left(_CGROUPS / folder, "memory.max", "memory.current", "inactive_file")
                elif "memory" in controllers.split(","):
                    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                    yield from _left(_CGROUPS / "memory" / folder, *names)


def _left(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # no such file, or "max"
        most, taken = (int((folder / name).read_text()) for name in (limit, used))
        yield max(0, most - taken + _numbers(folder / "memory.stat").get(cached, 0))


def _numbers(path: Path) -> Mapping[str, int]:
    """The first number of each line by its first word."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
