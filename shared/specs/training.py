"""What every training job may ask for, whatever the family."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from shared.specs.spec import DatasetId, Modality, ModelName, Seed, Spec, wrong

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "constant"]


class TrainSpec(Spec):
    """Fields shared by all families; each family adds its own."""

    modality: ClassVar[Modality]
    """The kind of dataset the family learns from."""
    tasks: ClassVar[frozenset[str]]
    """What a trained model of the family can be asked to do (``spec.task`` of a generate job)."""

    dataset: DatasetId
    """The dataset to learn from; it must be ready and of the family's modality."""
    model: ModelName
    """Name under which the result is registered; a new version each time."""
    steps: int = Field(default=2000, ge=1, le=10_000_000)
    """Number of optimizer steps."""
    batch_size: int = Field(default=128, ge=1, le=65_536)
    """Samples per optimizer step."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of AdamW."""
    warmup_steps: int | None = Field(default=None, ge=0, le=1_000_000)
    """Steps of linear warm-up from zero to ``learning_rate``; when left out a tenth of ``steps``, at most 100."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: half a cosine down to zero, or constant."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=1.0, gt=0, le=1e6)
    """Largest global gradient norm."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights; 0 keeps the raw weights."""
    precision: Precision = "auto"
    """Arithmetic of the forward and backward pass. ``auto`` is bf16 where the device multiplies it in
    hardware and fp32 elsewhere; ``fp16`` scales the loss. A resumed training keeps what it began with."""
    channels_last: bool | None = None
    """Lay images out as NHWC; when left out, on GPUs only (group norm is slow in NHWC on CPUs)."""
    seed: Seed = 0
    """Key of initial weights, batch order and noise."""
    checkpoint_every: int = Field(default=500, ge=1, le=1_000_000)
    """Steps between checkpoints, from which an interrupted training goes on."""
    keep_checkpoints: int = Field(default=3, ge=1, le=100)
    """How many of the last checkpoints are kept, beside the one with the lowest held-out loss."""
    preview_every: int | None = Field(default=None, ge=1, le=1_000_000)
    """Steps between sample sheets; once per epoch when left out."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainSpec":
        # The spec is stored with its defaults: what is checked must not depend on which fields were written out.
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise wrong("warmup_steps", "warmup_steps must not exceed steps")
        return self
