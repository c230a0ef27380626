"""The model families, by the name that ``spec.family`` has: ours, and those of installed packages."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from shared.errors import FamilyRefused
from shared.specs import FAMILIES as SPECS
from shared.specs import installed
from worker.families.consistency import FAMILY as CONSISTENCY
from worker.families.diffusion import FAMILY as DIFFUSION
from worker.families.family import Family
from worker.families.gan import FAMILY as GAN
from worker.families.style import FAMILY as STYLE
from worker.families.translation import FAMILY as TRANSLATION
from worker.families.vae import FAMILY as VAE
from worker.families.vq import FAMILY as VQ

_OWN: Final[Mapping[str, Family[Any, Any]]] = {
    "vae": VAE,
    "vq": VQ,
    "gan": GAN,
    "diffusion": DIFFUSION,
    "consistency": CONSISTENCY,
    "translation": TRANSLATION,
    "style": STYLE,
}


if TYPE_CHECKING:
    FAMILIES: Mapping[str, Family[Any, Any]]
else:

    @cache
    def __getattr__(name: str) -> object:
        """Looked for when asked for: a package's family imports this package before it can be registered."""
        if name == "FAMILIES":
            return {**_OWN, **_installed()}
        raise AttributeError(name)


def _installed() -> dict[str, Family[Any, Any]]:
    """The families that packages bring, each for the spec of its name."""
    found = installed.load(installed.FAMILIES, _OWN)
    for name, family in found.items():
        if not isinstance(family, Family) or family.spec is not SPECS.get(name):
            raise FamilyRefused(f"{name}: it must be a Family of the spec that is registered under this name")
    if missing := SPECS.keys() - _OWN.keys() - found.keys():
        raise FamilyRefused(f"{', '.join(sorted(missing))}: there is a spec, and no family for it")
    return found
