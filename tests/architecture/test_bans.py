"""What may be used in few places or none. Exact where ruff's banned-api is a table of files."""

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.conftest import PACKAGES, Module

# What -> the files that may, each for the reason given.
ALLOWED = {
    # Settings are read once and passed down. The client finds its server as every SDK does; the local stack hands its
    # environment on, as supervisors do to runners; cuBLAS, torch's compiler and a spawned child can be told nothing in
    # another way.
    "os.environ": {
        "noisemill/discovery.py",
        "noisemill/local/processes.py",
        "noisemill/local/servers.py",
        "noisemill/local/stack.py",
        "worker/engine/blocks.py",
        "worker/engine/numerics.py",
        "worker/__main__.py",
        "worker/births.py",
        "worker/nursery.py",
        "worker/parent.py",
    },
    "os.getenv": set(),
    # Nothing from outside is executed.
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
    "dill": set(),
    "joblib": set(),
    "cloudpickle": set(),
    "torch.load": set(),
    "torch.save": set(),
    "torch.hub": set(),
    "eval": set(),
    "exec": set(),
    "yaml.load": set(),
    # Layers draw their first weights from the global generator: seeded in one place, and forked around it.
    "torch.manual_seed": {"worker/engine/training.py"},
    "torch.random.fork_rng": {"worker/engine/training.py"},
    # All other noise is keyed by (seed, index, step, element).
    "torch.randn": set(),
    "torch.rand": set(),
    "torch.randint": set(),
    "torch.randperm": set(),
    "torch.randn_like": set(),
    "torch.rand_like": set(),
    "torch.normal": set(),
    "torch.bernoulli": set(),
    "torch.multinomial": set(),
    "torch.Generator": set(),
    "numpy.random": set(),
    "datetime.datetime.utcnow": set(),
}


def imports(module: Module) -> dict[str, str]:
    """Names that the module's imports bind, each with what it stands for."""
    bound: dict[str, str] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                first = name.name.partition(".")[0]
                bound |= {name.asname: name.name} if name.asname else {first: first, name.name: name.name}
        elif isinstance(node, ast.ImportFrom):
            bound |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return bound


def uses(module: Module) -> Iterator[str]:
    """Dotted names of everything that the module imports, calls or reads, with aliases resolved."""
    bound = imports(module)
    yield from bound.values()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, _, rest = ast.unparse(node).partition(".")
            if first in bound or not rest:
                yield ".".join(filter(None, (bound.get(first, first), rest)))


@pytest.fixture(scope="module")
def used(all_modules: list[Module]) -> dict[str, set[str]]:
    """What each file uses."""
    return {module.path: set(uses(module)) for module in all_modules}


def users_of(name: str, used: dict[str, set[str]]) -> set[str]:
    return {path for path, names in used.items() if any(use == name or use.startswith(f"{name}.") for use in names)}


def is_shipped(path: str) -> bool:
    return path.split("/", maxsplit=1)[0] in PACKAGES


@pytest.mark.parametrize("banned", ALLOWED)
def test_what_is_banned_is_used_only_where_it_is_allowed(used: dict[str, set[str]], banned: str):
    assert set(filter(is_shipped, users_of(banned, used))) <= ALLOWED[banned]


def test_no_process_s_clock_decides_about_jobs(used: dict[str, set[str]]):
    """Leases, deadlines and orders are the database's (``clock_timestamp()``)."""
    asking = users_of("datetime.datetime.now", used) | users_of("time.time", used)

    assert {path for path in asking if path.startswith("shared/jobs/")} == set()


@pytest.mark.parametrize("double", ["unittest.mock", "mock", "pytest_mock", "moto", "fakeredis", "mongomock"])
def test_tests_use_real_parts(used: dict[str, set[str]], double: str):
    assert users_of(double, used) == set()


def test_no_import_is_relative(all_modules: list[Module]):
    relative = [
        f"{module.path}:{node.lineno}"
        for module in all_modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]

    assert relative == []
