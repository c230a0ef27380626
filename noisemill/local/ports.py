"""Free ports on the loopback interface."""

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

# Below the range from which Linux takes ports for outgoing connections: one that is free now
# would otherwise be taken by somebody's client a moment later.
_RANGE = range(20_000, 32_000)


def is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` now."""
    with socket.socket() as probe:
        # Servers set it too; without it, closed connections of the last run would look like a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = random.SystemRandom().choice(_RANGE)
        if is_free(port):
            return port


@contextmanager
def reserving() -> Iterator[Callable[[int], bool]]:
    """Says of a port whether it is free, and then keeps it from others who ask so, until the end.

    Who starts a server listens only seconds later; two that start at once would both find the port free. It is
    reserved by binding its number for UDP, which nobody here uses, and which ends with the process.
    """
    with ExitStack() as held:

        def reserve(port: int) -> bool:
            mark = held.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            try:
                mark.bind(("127.0.0.1", port))
            except OSError:
                return False
            return is_free(port)

        yield reserve
