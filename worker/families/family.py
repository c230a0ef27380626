"""What a model family is to the engine: a bundle of plain parts. Knows no family and no engine."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from shared.specs.training import TrainSpec
from worker.kernels.noise import Noise

Batch = Mapping[str, Tensor]
"""Tensors of one batch by name, batch axis first: ``image`` is uint8 ``(B, C, H, W)``."""

SlotState = dict[str, Tensor]
"""All a sampler knows of its slots: tensors with a leading slot axis, one row per sample being drawn."""

IN_USE: Final = "in_use"
"""Of a state that ``Sampler.step`` is given, bool ``(S,)``: the rows of slots that hold no sample are nobody's, and a
sampler may have the network compute something else in them. Where it is left out all are in use."""


RequestT = TypeVar("RequestT", bound="Seeded", covariant=True)
SpecT = TypeVar("SpecT", bound=TrainSpec)
NetT = TypeVar("NetT", bound=nn.Module)


class Seeded(Protocol):
    """All that the engine must know of a request."""

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """What a network has to know of its data."""

    shape: tuple[int, ...]
    """Of one sample: ``(C, H, W)`` for images."""
    num_classes: int = 0
    """Zero for data without classes."""
    models: Mapping[str, "Origin"] = field(default_factory=dict[str, "Origin"])
    """The trained models that the network begins with or is built on, by the field of the spec that names them."""

    def as_json(self) -> dict[str, Any]:
        models = {name: origin.as_json() for name, origin in self.models.items()}
        return {"shape": list(self.shape), "num_classes": self.num_classes} | ({"models": models} if models else {})

    @classmethod
    def from_json(cls, info: Mapping[str, Any]) -> "DataInfo":
        """Read ``as_json``; what else ``info`` holds is ignored."""
        models = {name: Origin.from_json(origin) for name, origin in info.get("models", {}).items()}
        return cls(shape=tuple(info["shape"]), num_classes=info.get("num_classes", 0), models=models)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a trained model is, without its weights."""

    family: str
    spec: Mapping[str, Any]
    data: DataInfo

    def as_json(self) -> dict[str, Any]:
        return {"family": self.family, "spec": dict(self.spec), "info": self.data.as_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Origin":
        """Read ``as_json``, or the description of a model version; what else ``fields`` holds is ignored."""
        return cls(family=fields["family"], spec=fields["spec"], data=DataInfo.from_json(fields["info"]))

    def network(self) -> Any:
        """Its network, with initial weights that the engine overwrites."""
        from worker.families import FAMILIES  # noqa: PLC0415 - the registry imports the families, and they this

        family = FAMILIES[self.family]
        return family.build(family.spec.model_validate(self.spec), self.data)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a loss returns: the scalar to descend on, and named scalars to report (means over the batch)."""

    loss: Tensor
    values: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Draw(Generic[RequestT]):
    """One sample that was asked for: ``index`` of ``request``, with its inputs where the task has some."""

    request: RequestT
    """The task's spec (``shared.specs.tasks``); its ``seed`` and ``index`` are the key of all noise."""
    index: int
    inputs: Batch | None = None
    """One row per tensor, without the batch axis; always present or always absent within a task."""
    owner: object = None
    """Whose it is; nobody between who asked and who takes the sample looks at it."""


class Sampler(Protocol):
    """Draws samples in slots. Row ``i`` of every tensor belongs to slot ``i`` and must not look at other rows.

    Looping ``step`` over one slot is the plain sampler; the engine shares slots among strangers.
    """

    def num_steps(self, request: Any) -> int:
        """Steps after which a sample of ``request`` is done, at least 1."""
        ...

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        """A state with one row per draw; ``noise`` has the key of each row, at step 0."""
        ...

    def step(self, net: Any, state: SlotState, noise: Noise) -> SlotState:
        """One step for all slots, each at its own place; ``noise`` is keyed by the step each slot is at."""
        ...

    def finish(self, net: Any, state: SlotState) -> Tensor:
        """The samples in canonical form, slot axis first: uint8 ``(S, C, H, W)`` for images.

        The engine finishes each row alone, so that this need not be even across a tile.
        """
        ...


@runtime_checkable
class Foreseeing(Protocol):
    """A sampler that can tell on the way what its samples are going to be."""

    def look(self, net: Any, state: SlotState) -> Tensor:
        """As ``finish``, for slots that have had a step."""
        ...


@dataclass(frozen=True, kw_only=True)
class Score(Generic[SpecT, NetT]):
    """Something to measure of a trained model on each image of a dataset."""

    values: Callable[[SpecT, NetT, Batch, Noise], Tensor | Generator[None, None, Tensor]]
    """One number per image ``(B,)``, or as ``kind`` says. What takes long yields on the way, so as to be stopped."""
    kind: Literal["mean", "dimensions", "variation", "codes"] = "mean"
    """What is told of all images' values: their mean; the mean of each column of ``(B, Z)``, and their sum; how many
    columns vary; or how much of a codebook the int64 codes ``(B, L)`` use."""
    most: int | None = None
    """Only so many images are looked at, where each takes long."""
    num_codes: Callable[[SpecT], int] | None = None
    """Size of the codebook, for ``codes``."""


Loss = Callable[[SpecT, NetT, Batch, Noise], Measured]
Exporter = Callable[[Path, SpecT, NetT, DataInfo], str]
"""Writes the files of a trained model into a folder; returns how they are used, in Markdown, for the model card."""
Importer = Callable[[Mapping[str, Path], SpecT, NetT], None]
"""Fills the network with the weights of uploaded files, by their names; ``TrainSpec.imported`` has said what they are.
ModelLoadFailed if they are something else."""
SamplerFactory = Callable[[SpecT, DataInfo], Sampler]


@dataclass(frozen=True, kw_only=True)
class Family(Generic[SpecT, NetT]):
    """A kind of model. With one loss the whole network is trained; with several, each its own submodule."""

    spec: type[SpecT]
    build: Callable[[SpecT, DataInfo], NetT]
    """The network on the CPU, with initial weights from torch's global generator, which the engine seeds. A model that
    it is built on (``TrainSpec.built_on``) is its submodule of that name, from ``DataInfo.models``."""
    losses: Mapping[str, Loss[SpecT, NetT]]
    """One per trained part, in the order of their updates: a GAN has two, a VAE one."""
    tasks: Mapping[str, SamplerFactory[SpecT]]
    """What can be asked of a trained model (``spec.task``) and the sampler that does it."""
    scores: Mapping[str, Score[SpecT, NetT]] = field(default_factory=dict[str, Any])
    """What an evaluate job can measure of a trained model on data, beside its samples, where ``TrainSpec.scores_on``
    names it."""
    exports: Mapping[str, Exporter[SpecT, NetT]] = field(default_factory=dict[str, Any])
    """The formats in which a trained model can be exported, unless ``TrainSpec.check_export`` refuses it."""
    imports: Mapping[str, Importer[SpecT, NetT]] = field(default_factory=dict[str, Any])
    """The formats of uploaded files that can become a model, unless ``TrainSpec.imported`` refuses them."""
