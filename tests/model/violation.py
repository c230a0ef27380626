"""A broken promise, and how it came to that."""

from collections.abc import Sequence


class Violation(Exception):
    """``promise`` is the name of the invariant; ``trace`` the moves that lead to it from the submission."""

    def __init__(self, promise: str, what: str, trace: Sequence[str] = ()) -> None:
        self.promise = promise
        self.what = what
        self.trace = tuple(trace)
        steps = "".join(f"\n  {number}. {move}" for number, move in enumerate(trace, start=1))
        super().__init__(f"{promise}: {what}{steps}")

    def __reduce__(self) -> tuple[type["Violation"], tuple[str, str, tuple[str, ...]]]:
        """For another process to tell."""
        return Violation, (self.promise, self.what, self.trace)
