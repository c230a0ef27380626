"""What the classes have in common that see each operation of torch while they are in force."""

from torch.utils._python_dispatch import TorchDispatchMode


class Onlooker(TorchDispatchMode):
    """Sees operations through ``__torch_dispatch__``. Nothing may be compiled meanwhile."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler at the first operation, to keep it from what it does not see here.

        That takes as long as importing all the rest of torch, and is time that a runner's first job waits for.
        """
        return False
