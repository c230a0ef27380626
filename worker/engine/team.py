"""The processes that train one network together, each with a device and its own rows of every batch. Knows no network.

All of them hold the same weights and take the same steps. What they must have in common is added up or taken over
here; one process alone is a team, too, and never touches ``torch.distributed``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from typing import Any, Final, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

BUCKET_BYTES: Final = 64 * 2**20
"""Tensors travel together up to this size: few large messages, and no second copy of all gradients."""
PATIENCE: Final = timedelta(days=1)
"""How long a process waits for another. One that died is noticed at once, as its connection is closed; the first may
measure and show the network for as long as it likes."""
JOINING: Final = timedelta(minutes=2)
"""How long a process waits for the others to come at all."""
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    str(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
}


class Team:
    """One process's view of all. What is told, asked, given or added up is a meeting: all processes come to it, in the
    same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    @contextmanager
    def joined(cls, device: torch.device, *, meeting: str = "env://", rank: int = -1, size: int = -1) -> Iterator[Self]:
        """The team that meets at ``meeting``, until the end of the block.

        Args:
            device: of this process; gradients travel between devices of its kind, by NCCL or Gloo.
            meeting: where the processes find each other, as ``torch.distributed.init_process_group`` takes it: what
                ``torchrun`` says in the environment, a ``file://`` or a ``tcp://``.
            rank: the place of this process; with ``env://`` the environment says it.
            size: the number of processes; likewise.
        """
        # Decisions are made in main memory, so that they do not wait for what the device still computes.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, init_method=meeting, timeout=JOINING, rank=rank, world_size=size)
        _set_pg_timeout(PATIENCE)  # the public way changes what is waited for to come, too
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that measures, shows and stores the training."""
        return self.rank == 0

    def rows(self, num_rows: int) -> range:
        """Which rows of a batch this process computes: a block of them, no block longer by more than one."""
        start, stop = (rank * num_rows // self.size for rank in (self.rank, self.rank + 1))
        return range(start, stop)

    def most_rows(self, num_rows: int) -> int:
        """Rows of the longest block."""
        return -(-num_rows // self.size)

    def anybody(self, says: bool) -> bool:  # noqa: FBT001 (a question put to all)
        """Whether one of the processes says so."""
        if self.is_alone:
            return says
        answer = torch.tensor(int(says))
        dist.all_reduce(answer, dist.ReduceOp.MAX)
        return bool(answer)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, which has the same bits in each of them."""
        if self.is_alone:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            sums = flat.split([tensor.numel() for tensor in bucket])
            for tensor, total in zip(bucket, sums, strict=True):
                tensor.copy_(total.view(tensor.shape))

    def give(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Hand tensors in main memory, and what is JSON, to all others, who ``take`` them."""
        shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        self.tell({"notes": notes, "tensors": shapes})
        self.follow_first([tensor.contiguous() for tensor in tensors.values()])

    def take(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the first process gives."""
        told = self.hear()
        tensors = {name: torch.empty(shape, dtype=_DTYPES[dtype]) for name, (dtype, shape) in told["tensors"].items()}
        self.follow_first(list(tensors.values()))
        return tensors, told["notes"]

    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of the first process."""
        if not self.is_alone:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Say something that is JSON to all others, who ``hear`` it."""
        if self.is_alone:
            return
        text = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor(len(text)), src=0)
        dist.broadcast(text, src=0)

    def hear(self) -> dict[str, Any]:
        """What the first process tells."""
        length = torch.tensor(0)
        dist.broadcast(length, src=0)
        text = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, src=0)
        return json.loads(bytes(text.tolist()))


ALONE: Final = Team()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors by type, in order, as many at once as ``BUCKET_BYTES`` hold."""
    for _, alike in groupby(sorted(tensors, key=lambda one: str(one.dtype)), key=lambda one: one.dtype):
        bucket, size = list[Tensor](), 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        if bucket:
            yield bucket
