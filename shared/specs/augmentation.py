"""How training images may be altered before a model sees them, so that few images do for more."""

from pydantic import Field

from shared.specs.spec import Spec


class Augmentation(Spec):
    """Alterations that leave an image one of its kind; nothing is altered unless a field says so.

    A model learns what it is shown: with ``flip`` of one half it draws as many mirror images.
    """

    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability that an image is mirrored left to right."""
    shift: int = Field(default=0, ge=0, le=256)
    """Most pixels that an image is moved by, up or down and left or right; what comes in is the image mirrored at its
    edge. Each whole number is equally likely."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Grey levels are multiplied by a number at most this far from 1."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    """Distances from the image's mean are multiplied by a number at most this far from 1."""
    saturation: float = Field(default=0.0, ge=0, le=1)
    """Distances of the channels from their mean are multiplied by a number at most this far from 1; of images of one
    channel there are none."""

    @property
    def alters(self) -> bool:
        """Whether anything is done to images."""
        return self.moves or self.recolours

    @property
    def moves(self) -> bool:
        """Whether pixels change their places."""
        return self.flip > 0 or self.shift > 0

    @property
    def recolours(self) -> bool:
        """Whether pixels change their values."""
        return max(self.brightness, self.contrast, self.saturation) > 0
