"""A folder of diffusers, taken in: one network's configuration and weights, and the scheduler beside it.

JSON is parsed and the header of a safetensors file is read; neither can hold code. What can is refused by its name.
What the files mean is for a family to say (``TrainSpec.imported``), and this module knows none.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final, cast

from safetensors import SafetensorError, safe_open

from shared.errors import DatasetInvalid
from shared.media import is_pickle, is_weights
from shared.specs.diffusers_folder import CONFIG, INDEX, SCHEDULER, WEIGHTS
from worker.data.members import refuse, shown
from worker.data.progress import Progress
from worker.data.spool import Entry, Spool
from worker.data.writing import Canonical

FORMAT: Final = "diffusers"
MAX_JSON_BYTES: Final = 1 << 16
MAX_HEADER_BYTES: Final = 4 << 20
MAX_TENSORS: Final = 10_000
COMPONENTS: Final = frozenset({"unet", "scheduler"})
"""Of a pipeline that is a model by itself."""


def convert_model(spool: Spool, entries: Sequence[Entry], folder: Path, *, progress: Progress) -> Canonical:
    """Write the network's files, whatever folder they lay in; the weights byte for byte.

    ``info`` has what a family looks at (``TrainSpec.imported``): ``format``, ``config`` and ``scheduler``.

    Raises:
        DatasetInvalid: some are missing, too many, damaged, or no files of this kind; the message names them.
    """
    progress.phase("converting", 900)
    weights = _weights(entries)
    config = _beside(entries, weights, CONFIG)
    if config is None:
        raise refuse(weights.name, f"there is no {CONFIG} beside it")
    scheduler = _beside(entries, weights, SCHEDULER, "scheduler")
    _require_whole(spool, _beside(entries, weights, INDEX, ""))
    described = {CONFIG: _read_json(spool, config)}
    described |= {} if scheduler is None else {SCHEDULER: _read_json(spool, scheduler)}
    files = {name: folder / name for name in (*described, WEIGHTS)}
    for name, content in described.items():
        files[name].write_text(json.dumps(content, sort_keys=True), "ascii")
    with files[WEIGHTS].open("wb") as file:
        file.writelines(spool.chunks(weights))
    with files[WEIGHTS].open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    told = {"format": FORMAT, "config": described[CONFIG], "scheduler": described.get(SCHEDULER), "sha256": sha256}
    return Canonical(modality="model", count=1, files=files, info=told | _tensors(files[WEIGHTS], weights.name))


def _weights(entries: Iterable[Entry]) -> Entry:
    """The only weights among the entries."""
    by_name = sorted(entries, key=lambda entry: entry.name)
    found = [entry for entry in by_name if is_weights(entry.name)]
    for entry in by_name:
        if is_pickle(entry.name):
            raise refuse(entry.name, f"a pickle can run code, and is not read: save the weights as {WEIGHTS}")
    if len(found) != 1:
        names = ", ".join(shown(entry.name) for entry in found[:3]) or "there is none"
        raise DatasetInvalid(f"a model is one {WEIGHTS}; {len(found)} were found: {names}")
    if found[0].name.rpartition("/")[2] != WEIGHTS:
        raise refuse(found[0].name, f"weights are looked for in {WEIGHTS}")
    return found[0]


def _beside(entries: Iterable[Entry], weights: Entry, name: str, sibling: str | None = None) -> Entry | None:
    """The file of this name in the weights' own folder or, in a pipeline's, in ``sibling`` of that."""
    above = weights.folder.rpartition("/")[0]
    folders = [weights.folder] if sibling is None else [weights.folder, _path(above, sibling)]
    found = {entry.name: entry for entry in entries}
    return next((found[one] for folder in folders if (one := _path(folder, name)) in found), None)


def _path(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _require_whole(spool: Spool, index: Entry | None) -> None:
    """Refuse a network that works in a pipeline with others."""
    if index is None:
        return
    others = sorted(name for name in _read_json(spool, index) if not name.startswith("_") and name not in COMPONENTS)
    if others:
        named = ", ".join(shown(name) for name in others[:3])
        raise refuse(index.name, f"the pipeline has parts besides a UNet and a scheduler, which would be lost: {named}")


def _read_json(spool: Spool, entry: Entry) -> dict[str, Any]:
    """An object that PostgreSQL and every client can hold, too."""
    try:
        content = json.loads(spool.read(entry, at_most=MAX_JSON_BYTES), object_pairs_hook=_distinct)
        # What is no number, or no character, is in neither.
        text = json.dumps(content, allow_nan=False, ensure_ascii=False)
        if b"\\u0000" in text.encode("utf-8"):
            raise ValueError("it holds a NUL character")
    except (ValueError, RecursionError) as error:
        raise refuse(entry.name, f"it is not JSON that can be read ({str(error)[:200]})") from error
    if not isinstance(content, dict):
        raise refuse(entry.name, "it holds no JSON object")
    return cast(dict[str, Any], content)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field occurs twice")
    return found


def _tensors(path: Path, name: str) -> dict[str, int]:
    """How many there are, and of how many numbers; the file is whole, and its header speaks of all of it."""
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
            raise refuse(name, f"it is not safetensors, or its header is larger than {MAX_HEADER_BYTES} bytes")
    try:
        with safe_open(path, framework="np") as tensors:
            shapes = [tensors.get_slice(one).get_shape() for one in tensors.keys()]  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise refuse(name, f"it is not safetensors, or damaged ({str(error)[:200]})") from error
    if len(shapes) > MAX_TENSORS:
        raise refuse(name, f"it holds more than {MAX_TENSORS} tensors")
    return {"num_tensors": len(shapes), "num_parameters": sum(prod(shape) for shape in shapes)}
