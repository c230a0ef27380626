"""Ask the decoder process for pixels; survive whatever becomes of it."""

import json
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from shared.errors import DatasetInvalid, InternalError
from worker.data import decoder
from worker.data.members import CHUNK_BYTES, shown
from worker.data.rejects import BadSample
from worker.data.spool import Entry, Spool

ANSWER_SECONDS: Final = 30.0
"""Longest wait for one image; above its processor time, as the machine may be busy."""
MAX_DEATHS: Final = 3
"""So many images may cost the decoder its life; after that the upload is taken for an attack."""
MAX_REPLY_BYTES: Final = 1 << 16

# Without the runner's environment, which holds keys.
ENVIRONMENT: Final = {"LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "2"}


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What an image's header says."""

    height: int
    width: int
    is_grey: bool


class Decoder:
    """One long-lived process that decodes the images of a spool; a killed one is replaced."""

    def __init__(self, spool: Spool, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        self._spool = spool
        self._answer_seconds = answer_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._num_deaths = 0

    @property
    def pid(self) -> int | None:
        """The process that decodes now, if there is one."""
        return self._process and self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def probe(self, entry: Entry) -> ImageFacts:
        """Read an image's header.

        Raises:
            BadSample: it is not an image, or not one that may be decoded.
        """
        facts, _ = self._ask(entry, {"do": "probe"}, 0)
        return ImageFacts(height=facts["height"], width=facts["width"], is_grey=facts["is_grey"])

    def decode(self, entry: Entry, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """Decode an image and fit it to ``shape`` (C, H, W).

        Raises:
            BadSample: the image is damaged, or took too much time or memory.
        """
        channels, height, width = shape
        _, pixels = self._ask(entry, {"do": "decode", "shape": shape}, channels * height * width)
        return np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)

    def _ask(self, entry: Entry, request: dict[str, Any], num_bytes: int) -> tuple[dict[str, Any], bytes]:
        process = self._process = self._process or _start(self._spool.path)
        line = json.dumps({**request, "offset": entry.offset, "size": entry.size}).encode() + b"\n"
        try:
            _pipe(process.stdin).write(line)
            reply, pixels = _receive(_pipe(process.stdout), num_bytes, time.monotonic() + self._answer_seconds)
        except (OSError, EOFError, TimeoutError) as error:
            raise self._died(entry, error) from error
        if "error" in reply:
            raise BadSample(reply["error"])
        return reply, pixels

    def _died(self, entry: Entry, error: Exception) -> BadSample | DatasetInvalid:
        status = self._stop()
        self._num_deaths += 1
        took_too_long = isinstance(error, TimeoutError)
        what = f"took more than {self._answer_seconds:g} s" if took_too_long else f"killed it (status {status})"
        reason = f"cannot be decoded: the decoder {what}"
        if self._num_deaths > MAX_DEATHS:
            return DatasetInvalid(f"{shown(entry.name)} {reason}, like {MAX_DEATHS} images before it")
        return BadSample(reason)

    def _stop(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        # A process that died by itself keeps its own status; kill() is then without effect.
        status = process.poll()
        process.kill()
        process.communicate()
        return process.returncode if status is None else status


def _start(spool_path: Path) -> subprocess.Popen[bytes]:
    # In our process group: who kills the runner's group kills the decoder too.
    return subprocess.Popen(
        [sys.executable, "-I", str(Path(decoder.__file__)), str(spool_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        bufsize=0,
    )


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise InternalError("the decoder has no pipe")
    return pipe


def _receive(pipe: IO[bytes], num_bytes: int, deadline: float) -> tuple[dict[str, Any], bytes]:
    """Read one line of JSON and, unless it reports an error, so many bytes after it."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        received = bytearray()
        while (line_end := received.find(b"\n")) < 0:
            received += _some(pipe, selector, deadline)
            if len(received) > MAX_REPLY_BYTES + num_bytes:
                raise EOFError("the decoder sent no answer")
        reply = json.loads(received[:line_end])
        end = line_end + 1 + (0 if "error" in reply else num_bytes)
        while len(received) < end:
            received += _some(pipe, selector, deadline)
    return reply, bytes(received[line_end + 1 : end])


def _some(pipe: IO[bytes], selector: selectors.BaseSelector, deadline: float) -> bytes:
    if not selector.select(max(0.0, deadline - time.monotonic())):
        raise TimeoutError
    data = pipe.read(CHUNK_BYTES)
    if not data:
        raise EOFError("the decoder ended")
    return data
