"""What every training job may ask for, whatever the family."""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from shared.specs.augmentation import Augmentation
from shared.specs.export import ExportSpec
from shared.specs.imports import ImportSpec
from shared.specs.spec import FROM_LIST, DatasetId, Direction, Modality, ModelName, ModelRef, Seed, Spec, wrong
from shared.specs.tasks import Request

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "pure_bf16"]
Schedule = Literal["cosine", "constant"]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], FROM_LIST]
NEARNESS: Final[Mapping[str, Direction]] = {"frechet_distance": "lower", "kernel_distance": "lower"}
"""What can be measured of samples while a training goes on: as by an evaluate job, with fewer of them."""
FEWEST_HELD_OUT: Final = 2
"""Images that samples can be compared to."""
Uses = Mapping[str, Mapping[str, Collection[Any]]]
"""Fields, each with the other fields that it depends on: it means something where each has one of these values."""


class TrainSpec(Spec):
    """Fields shared by all families; each family adds its own."""

    modality: ClassVar[Modality]
    """The kind of dataset the family learns from."""
    tasks: ClassVar[Mapping[str, frozenset[str]]]
    """What a trained model of the family can be asked to do (``spec.task`` of a generate job), each with the options
    of that task that the family understands (``shared.specs.tasks.OPTIONS``)."""
    starts_from: ClassVar[frozenset[str]] = frozenset()
    """The families whose weights ``init_from`` may name; a family that may only go on from its own needs none."""
    exports: ClassVar[frozenset[str]] = frozenset()
    """The formats that a trained model of the family may be exported in (``shared.specs.export``)."""
    imports: ClassVar[frozenset[str]] = frozenset()
    """The formats of uploaded files that may become a model of the family (``info.format`` of the dataset)."""
    built_on: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Fields that name a trained model which becomes a frozen part of the network, each with the families it may be
    of. The part is the submodule of the field's name."""
    further_datasets: ClassVar[tuple[str, ...]] = ()
    """Fields that name a dataset beside ``dataset``, of its modality and shape. A batch has as many samples of it,
    under the field's name, in an order of their own."""
    used_with: ClassVar[Uses] = {"ema_decay": {"ema": {"exponential"}}, "ema_snapshots": {"ema": {"power"}}}
    """Fields that mean nothing beside some values of others; a family adds its own."""
    architecture: ClassVar[frozenset[str]] = frozenset()
    """Fields that say which weights the network has, and what they mean. A training that begins with a model of its own
    family (``init_from``) has that model's, also where they are left out."""

    dataset: DatasetId
    """The dataset to learn from; it must be ready and of the family's modality."""
    model: ModelName
    """Name under which the result is registered; a new version each time."""
    steps: int = Field(default=2000, ge=1, le=10_000_000)
    """Number of optimizer steps."""
    batch_size: int = Field(default=128, ge=1, le=65_536)
    """Samples per optimizer step."""
    micro_batch: Annotated[int, Field(ge=1, le=65_536)] | Literal["auto"] | None = None
    """Samples that go through the network at once, on each device; their gradients add up to the batch's. ``auto`` is
    the largest power of two that fits into memory, found by trying before the first step. When left out all that a
    device has of the batch. Less, in any case, where memory runs out on the way."""
    recompute: bool = False
    """Keep the inputs of a network's blocks alone, and compute the rest again in the backward pass: the same bits, with
    less memory, for about a third more time (``diffusion`` and ``consistency``)."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of AdamW."""
    warmup_steps: int | None = Field(default=None, ge=0, le=1_000_000)
    """Steps of linear warm-up from zero to ``learning_rate``; when left out a tenth of ``steps``, at most 100."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: half a cosine down to zero, or constant."""
    betas: Betas = (0.9, 0.999)
    """Decay of AdamW's averages of the gradient and of its square."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=1.0, gt=0, le=1e6)
    """Largest global gradient norm."""
    ema: Literal["exponential", "power"] = "exponential"
    """How the weights are averaged. With ``power`` (Karras et al., 2024) the length of the average is a tenth of the
    training, and a ``reaverage`` job makes of it any other from a twentieth to a quarter."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the moving average of the weights; 0 keeps the raw weights (``exponential`` only)."""
    ema_snapshots: int = Field(default=8, ge=2, le=64)
    """How often, at equal intervals, two averages are copied for a ``reaverage`` job; each checkpoint holds all copies
    made so far, eight bytes a weight and copy (``power`` only)."""
    augmentation: Augmentation = Augmentation()
    """Alterations of the images that are trained on, drawn anew in each step; held-out images stay as they are."""
    precision: Precision = "auto"
    """Arithmetic of the forward and backward pass. ``auto`` is bf16 where the device multiplies it in hardware and fp32
    elsewhere. ``bf16`` and ``fp16`` are autocast, and ``fp16`` scales the loss. ``pure_bf16`` (``diffusion`` and
    ``consistency``) computes with bf16 weights and learns in fp32: optimizer, averages and checkpoints have the exact
    weights. ``tf32`` lets GPUs round the matrices that they multiply to 10 bits, and is fp32 elsewhere. A resumed
    training keeps what it began with."""
    channels_last: bool | None = None
    """Lay images out as NHWC; when left out, on GPUs, and for diffusion, conv VAEs and DCGANs on CPUs where a C++
    compiler is at hand (torch's own group norm is slow in NHWC there)."""
    compiled_from: Annotated[int, Field(ge=1, le=10_000_000)] | Literal["auto"] | None = None
    """The step from which the network's repeated blocks are computed by code that is compiled meanwhile: faster where
    the device is, and other last bits. ``auto`` is whenever it is ready, which no other training will do at the same
    step. At a number the training waits for it, and can be reproduced. Where nothing can be compiled, never."""
    captured: bool = False
    """Record the kernels of a step once, as a CUDA graph, and have the GPU repeat them: the same arithmetic, without
    the launch of each, which small batches wait for most of the time. Steps that cannot be recorded, and those of
    another device, are computed as usual, and the job's log says why."""
    seed: Seed = 0
    """Key of initial weights, batch order and noise."""
    checkpoint_every: int = Field(default=500, ge=1, le=1_000_000)
    """Steps between checkpoints, from which an interrupted training goes on."""
    keep_checkpoints: int = Field(default=3, ge=1, le=100)
    """How many of the last checkpoints are kept, beside the best by ``best_by``."""
    best_by: str | None = None
    """The figure that says which of two states of the training is better: a held-out loss or what it is made of, or the
    ``frechet_distance`` or ``kernel_distance`` of 256 samples to held-out images, which are drawn for it whenever the
    training is measured. The loss when left out."""
    weights: Literal["last", "best"] = "last"
    """Which weights become the model's version: those after the last step, or those that were measured best, by
    ``best_by``, at the end or when a sample sheet was made."""
    init_from: ModelRef | None = None
    """Fine-tune: begin with the weights of this model version instead of random ones."""
    preview_every: int | None = Field(default=None, ge=1, le=1_000_000)
    """Steps between sample sheets; once per epoch when left out."""

    @classmethod
    def derived(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG003 - families look at it
        """What fields that were left out are, where that follows from those ``given``, which nobody has checked."""
        return {}

    @model_validator(mode="wrap")
    @classmethod
    def _complete(cls, fields: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(fields, Mapping):
            return handler(fields)
        given: dict[str, Any] = dict(fields)  # pyright: ignore[reportUnknownArgumentType]
        spec = handler({**cls.derived(given), **given})
        # What follows from other fields was not set by anybody: it follows anew when one of those is another.
        spec.model_fields_set.intersection_update(given)
        return spec

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainSpec":
        # The spec is stored with its defaults: what is checked must not depend on which fields were written out.
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise wrong("warmup_steps", "warmup_steps must not exceed steps")
        return self

    @model_validator(mode="after")
    def _rounded_weights_are_used(self) -> "TrainSpec":
        if self.precision == "pure_bf16" and not self.computes_in_type_of_weights:
            raise wrong("precision", "no network of this model computes in the type of its weights: use bf16")
        return self

    @model_validator(mode="after")
    def _memory_can_be_saved(self) -> "TrainSpec":
        if self.recompute and not self.has_blocks:
            raise wrong("recompute", "the network of this model has no blocks that could be computed again")
        if isinstance(self.micro_batch, int) and self.micro_batch > self.batch_size:
            raise wrong("micro_batch", "micro_batch must not exceed batch_size")
        if self.micro_batch is not None and self.couples_samples:
            raise wrong("micro_batch", "samples of this model depend on one another: a batch should stay whole")
        return self

    @model_validator(mode="after")
    def _blocks_can_be_compiled(self) -> "TrainSpec":
        if self.compiled_from is not None and not self.repeats_blocks:
            raise wrong("compiled_from", "the network of this model has no repeated blocks that could be compiled")
        if isinstance(self.compiled_from, int) and self.compiled_from >= self.steps:
            raise wrong("compiled_from", "compiled_from must be below steps")
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> "TrainSpec":
        known = self.ranked_by()
        if self.best_by is not None and self.best_by not in known:
            names = f"it can be {', '.join(sorted(known))}" if known else "this model has no such figure"
            raise wrong("best_by", f"{self.best_by} does not say which of two states is better; {names}")
        if self.weights == "best" and (self.best_by or "loss") not in known:
            raise wrong("weights", "no held-out loss says which of two states of this model is better")
        return self

    @property
    def nhwc_on_cpu(self) -> bool:
        """Whether its images are laid out as NHWC on CPUs too, where kernels for that can be compiled."""
        return False

    @property
    def computes_in_type_of_weights(self) -> bool:
        """Whether its network, or the largest part of it, can be given rounded weights: to learn with ``precision:
        pure_bf16``, and to draw in bf16."""
        return False

    @property
    def has_blocks(self) -> bool:
        """Whether its network is made of blocks that can be computed again (``recompute``)."""
        return False

    @property
    def repeats_blocks(self) -> bool:
        """Whether its network is made of blocks that can be compiled one by one (``compiled_from``)."""
        return False

    @property
    def couples_samples(self) -> bool:
        """Whether in training the network computes something of all samples at once, as batch normalisation does, or
        learns of them beside the gradient, so that several processes cannot share a batch."""
        return False

    @property
    def most_processes(self) -> int:
        """How many processes can share a batch; together they do what one does, but for rounding."""
        return 1 if self.couples_samples else self.batch_size

    def compared_by(self) -> Mapping[str, Direction]:
        """The held-out figures by which two states of a training are compared, each with what is better of it."""
        return {}

    @property
    def can_draw(self) -> bool:
        """Whether samples can be drawn from the model, of no class in particular."""
        return self.modality == "image" and "generate" in self.tasks

    def ranked_by(self) -> Mapping[str, Direction]:
        """What ``best_by`` may be."""
        return {**self.compared_by(), **(NEARNESS if self.can_draw else {})}

    def scores_on(self, data: Mapping[str, Any], info: Mapping[str, Any]) -> frozenset[str]:
        """What a trained model can be measured by on images, beside its samples: keys of its family's ``scores``.

        ``data`` tells of the dataset that it is measured on, ``info`` of the one that it has learned from.
        """
        return frozenset()

    def trains(self, part: str, step: int) -> bool:
        """Whether ``part`` of the network is updated in ``step``; the others stand still."""
        return True

    def betas_at(self, step: int) -> tuple[float, float]:
        """``betas`` of the update in ``step``."""
        return self.betas

    def decided_by(self, step: int) -> Hashable:
        """What the losses make of the number of ``step``, where they ask for it (``Noise.step``): steps of which that
        is equal are computed alike. None for losses that do not ask."""
        return None

    def feature_networks(self) -> Mapping[str, str]:
        """The parts of the network that are feature networks, frozen: the submodule, and the network's name."""
        return {}

    def references(self) -> dict[str, tuple[ModelRef, frozenset[str]]]:
        """The models that a training needs: the field that names it, its reference, the families it may be of."""
        own = self.starts_from or frozenset({str(getattr(self, "family", ""))})
        wanted = {"init_from": own, **self.built_on}
        named = {field: getattr(self, field) for field in wanted}
        return {field: (ref, wanted[field]) for field, ref in named.items() if ref is not None}

    def is_used(self, field: str) -> bool:
        """Whether ``field`` means something beside the others."""
        return all(getattr(self, other) in values for other, values in self.used_with.get(field, {}).items())

    def check_fields(self) -> None:
        """Refuse what was given to fields that mean nothing beside the others; what they are by themselves they may be.

        Asked of a spec that is submitted, not of one that was stored.

        Raises:
            PydanticCustomError: as ``wrong`` makes it, naming the field.
        """
        unused = [field for field in type(self).model_fields if not self.is_used(field)]
        left_out = type(self).model_validate(self.model_dump(exclude=set(unused)))
        for field in unused:
            if getattr(self, field) != getattr(left_out, field):
                needed = " and ".join(f"{other} {_any_of(values)}" for other, values in self.used_with[field].items())
                raise wrong(field, f"{field} means nothing here: it is for {needed}")

    def check_data(self, infos: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse datasets that this training cannot use; ``infos`` tell of them, by the field that names them.

        Raises:
            PydanticCustomError: as ``wrong`` makes it, naming the field.
        """
        for field, info in infos.items():
            num_held_out = info.get("counts", {}).get("held_out")
            if self.weights == "best" and num_held_out == 0:
                raise wrong("weights", f"{field} has no held-out samples, which say what is best")
            if self.best_by in NEARNESS and num_held_out is not None and num_held_out < FEWEST_HELD_OUT:
                raise wrong("best_by", f"{field} has {num_held_out} held-out images, and {FEWEST_HELD_OUT} are needed")

    def begun_with(self, origin: "TrainSpec") -> Self:
        """This spec with the architecture of the model that it begins with, where that was left out.

        Raises:
            ValidationError: what was given does not fit it.
        """
        if type(origin) is not type(self):
            return self
        left_out = {field for field in self.architecture - self.model_fields_set if origin.is_used(field)}
        given = {field: getattr(self, field) for field in self.model_fields_set}
        return type(self).model_validate({field: getattr(origin, field) for field in left_out} | given)

    def check_references(self, models: Mapping[str, "Trained"], info: Mapping[str, Any]) -> None:
        """Refuse ``models``, by the field that names them, which this training cannot use; ``info`` tells of its data
        (``shape``, ``num_classes``).

        Raises:
            PydanticCustomError: as ``wrong`` makes it, naming the field.
        """
        origin = models.get("init_from")
        if origin is None or type(origin.spec) is not type(self):
            return
        for field in type(self).model_fields:
            if field in self.architecture and self.is_used(field):
                self._check_same(field, origin.spec)
        self._check_same_classes(origin.num_classes, self.num_classes(info))

    def _check_same(self, field: str, origin: "TrainSpec") -> None:
        ours, theirs = getattr(self, field), getattr(origin, field)
        # Of a model that has not seen classes both say the same: how many it knows is looked at instead.
        if field != "class_conditional" and ours != theirs:
            raise wrong(field, f"{field} is {theirs} in the model that init_from names: it cannot be {ours} here")

    def _check_same_classes(self, theirs: int, ours: int) -> None:
        if theirs != ours:
            chosen = not theirs or not getattr(self, "class_conditional", False)
            known = f"the model that init_from names knows {theirs} classes, and this one would know {ours}"
            raise wrong("class_conditional" if chosen else "dataset", known)

    def num_classes(self, info: Mapping[str, Any]) -> int:
        """Classes that a model of this spec knows, being trained on data of ``info``."""
        return info.get("num_classes", 0) if getattr(self, "class_conditional", False) else 0

    def check_task(self, request: Request, info: Mapping[str, Any]) -> None:
        """Refuse what a model of this spec cannot be asked; ``info`` tells of its data (``shape``, ``num_classes``).

        Raises:
            PydanticCustomError: as ``wrong`` makes it, naming the field.
        """
        if request.compiled and not self.repeats_blocks:
            raise wrong("compiled", "the network of this model has no repeated blocks that could be compiled")
        understood = self.tasks[request.task]
        defaults = type(request).model_fields
        for name, value in request.options().items():
            if name not in understood and value != defaults[name].default:
                raise wrong(name, f"{name} means nothing to this model")
        num_classes = self.num_classes(info)
        labels: list[int] | None = request.options().get("labels")
        if labels and max(labels) >= num_classes:
            raise wrong(
                "labels", f"the model knows {num_classes} classes" if num_classes else "the model has no classes"
            )

    def check_export(self, export: ExportSpec, info: Mapping[str, Any]) -> None:
        """Refuse a format that no model of the family is exported in, or not this one; ``info`` tells of its data.

        Raises:
            PydanticCustomError: as ``wrong`` makes it, naming the field.
        """
        if export.format not in self.exports:
            family = getattr(self, "family", "")
            raise wrong("model", f"a model of the family {family} cannot be exported as {export.format}")

    @classmethod
    def imported(cls, wanted: ImportSpec, files: Mapping[str, Any]) -> "Trained":
        """The model that uploaded ``files`` of one of ``imports`` are; it has the fields that are known of it set.

        Raises:
            PydanticCustomError: as ``wrong`` makes it, naming the field.
        """
        raise NotImplementedError(f"{cls.__name__} imports {sorted(cls.imports)}, and does not say how")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that a training names: what was asked for, and what is known of its data."""

    spec: TrainSpec
    info: Mapping[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes that it knows."""
        return self.spec.num_classes(self.info)


def _any_of(values: Collection[Any]) -> str:
    return " or ".join(sorted(str(value) for value in values))
