"""Install a package, as far as Python can tell: its metadata in a folder, for a path to name."""

from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PIXEL_GAUSSIAN = {
    "noisemill.specs": {"pixel_gaussian": "tests.plugin.pixel_gaussian_spec:PixelGaussianSpec"},
    "noisemill.families": {"pixel_gaussian": "tests.plugin.pixel_gaussian:FAMILY"},
}
"""Entry points of the package that brings the family of this folder."""


def install(folder: Path, groups: Mapping[str, Mapping[str, str]], name: str = "pixel_gaussian") -> None:
    """Put into ``folder`` what a package with these entry points would leave there."""
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    told = {group: "".join(f"{key} = {value}\n" for key, value in each.items()) for group, each in groups.items()}
    (metadata / "entry_points.txt").write_text("".join(f"[{group}]\n{entries}\n" for group, entries in told.items()))
