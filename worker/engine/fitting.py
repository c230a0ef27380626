"""How much fits into memory at once, found by trying. Knows no network."""

from collections.abc import Callable

from shared.errors import OutOfMemory


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest power of two that ``fits``, or ``most`` if even that does. Nothing larger than twice it is tried.

    Raises:
        OutOfMemory: not even one does.
    """
    found = 0
    while found < most and fits(size := min(max(1, 2 * found), most)):
        found = size
    if not found:
        raise OutOfMemory("not even one sample fits into memory beside the network and its optimizer")
    return found
