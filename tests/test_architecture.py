"""The house rules of the code, held against the tree: who may import what, what is never used, what lies where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import fedtune

ROOT = Path(__file__).parents[1]
HAND_WRITTEN = sorted(path for path in (ROOT / "fedtune").rglob("*.py") if not path.name.endswith("_pb2.py"))
RECIPES = sorted((ROOT / "simulations").rglob("*.toml"))

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("seeds",),
    ("tensors", "data"),
    ("directions", "lora", "number_formats"),
    ("pruning", "class_sums"),
    ("tasks",),
    ("messages",),
    ("probing", "evaluation"),
    ("methods", "planning", "wire", "model"),
    ("rounds",),
    ("search",),
    ("simulation", "devices", "store"),
    ("link", "report"),
    ("tracking", "live"),
    ("config", "flower"),
    ("client", "edge"),
    ("runs", "terminal"),
    ("deployment", "api"),
    ("cli",),
    ("__main__",),
)
"""Modules and packages directly below fedtune/, from the ground up: imports only go down."""

HOMES: Mapping[str, frozenset[str]] = {
    "torch": frozenset({"model", "client", "directions"}),
    "onnx": frozenset({"model"}),
    "onnxruntime": frozenset({"edge"}),
    "tokenizers": frozenset({"edge", "model"}),
    "xllamacpp": frozenset({"edge"}),
    "numba": frozenset({"directions"}),
    "transformers": frozenset({"model", "client"}),
    "peft": frozenset({"model", "client"}),
    "optuna": frozenset({"search"}),
    "bitsandbytes": frozenset({"model"}),
    "lm_eval": frozenset({"runs"}),
    "datasets": frozenset({"data"}),
    "pydantic": frozenset({"config"}),
    "yaml": frozenset({"config"}),
    "tomllib": frozenset({"config", "report"}),  # the report reads name and seed of a run that was killed
    "mlflow": frozenset({"tracking"}),
    "trackio": frozenset({"tracking"}),
    "wandb": frozenset({"tracking"}),
    "tensorboard": frozenset({"report"}),
    "typer": frozenset({"cli"}),
    "rich": frozenset({"cli", "terminal"}),
    "matplotlib": frozenset({"report"}),
    "jinja2": frozenset({"data", "report", "edge"}),  # chat templates raise its errors
    "google": frozenset({"wire"}),
    "flwr": frozenset({"flower"}),
    "grpc": frozenset({"link"}),
    "cryptography": frozenset({"link"}),
    "prometheus_client": frozenset({"link"}),
}
"""Where alone a package may be imported, at the top of a module or inside a function."""

SERVER_WING = (
    "devices",
    "methods",
    "planning",
    "wire",
    "rounds",
    "search",
    "store",
    "report",
    "tracking",
)
SEEDS_TORCH = {"fedtune/model/torch_seed.py"}
"""May fork and seed torch's global generators, for dropout and initial values that take no generator."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Return every node of a module, found once for all tests."""
    return list(ast.walk(tree(path)))


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def unit(name: str) -> str:
    """Return what stands directly below fedtune/ and holds a module; the lazy package root stands for `api`."""
    part = name.split(".")[1] if "." in name else "api"
    return "api" if part in fedtune.__all__ else part


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of everything that a module imports, wherever in it."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path)}:{node.lineno}: expected an absolute import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for an attribute of an attribute of a name, with `?` for any other start."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def loaded(statement: str) -> set[str]:
    """Return the top-level modules that a fresh process has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_part_of_the_package_has_a_floor() -> None:
    parts = {path.relative_to(ROOT / "fedtune").parts[0].removesuffix(".py") for path in HAND_WRITTEN} - {"__init__"}
    assert parts <= {part for floor in FLOORS for part in floor}


def test_imports_only_go_down() -> None:
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    faults = []
    for path in HAND_WRITTEN:
        if path.parent == ROOT / "fedtune" and path.stem == "__init__":
            continue  # gives names on first use and loads nothing; its table is checked below
        here = unit(module(path))
        for line, name in imports(path):
            there = unit(name) if name.split(".")[0] == "fedtune" else here
            if here == there or floor[there] < floor[here]:
                continue
            faults.append(f"{where(path)}:{line}: {here} (floor {floor[here]}) imports {there} (floor {floor[there]})")
    assert not faults, "\n".join(faults)


def test_no_two_modules_import_each_other() -> None:
    graph = {module(path): module_imports(path) for path in HAND_WRITTEN if path.parent != ROOT / "fedtune"}
    circles = [f"{a} <-> {b}" for a, names in graph.items() for b in names if a < b and a in graph.get(b, ())]
    assert not circles


def module_imports(path: Path) -> set[str]:
    """Return the modules of fedtune that a module imports."""
    modules = {module(other) for other in HAND_WRITTEN} | {"fedtune.wire.v1.round_pb2", "fedtune.wire.v1.link_pb2"}
    names = {name for _, name in imports(path)}
    return {name if name in modules else name.rpartition(".")[0] for name in names if name.startswith("fedtune.")}


def test_each_heavy_package_is_imported_in_its_home_only() -> None:
    faults = [
        f"{where(path)}:{line}: {name}, at home in {sorted(HOMES[name.split('.')[0]])}"
        for path in HAND_WRITTEN
        for line, name in imports(path)
        if unit(module(path)) not in HOMES.get(name.split(".")[0], {unit(module(path))})
    ]
    assert not faults, "\n".join(faults)


def test_the_server_wing_loads_no_torch() -> None:
    wing = [module(path) for path in HAND_WRITTEN if unit(module(path)) in SERVER_WING]
    assert {unit(name) for name in wing} == set(SERVER_WING)
    assert not loaded("import " + ", ".join(wing)) & {"torch", "transformers", "peft", "datasets", "pydantic"}


def test_a_client_needs_nothing_of_the_server_wing() -> None:
    paths = {module(path): path for path in HAND_WRITTEN}
    seen, ahead = set(), ["fedtune.client.perform"]
    while ahead:
        name = ahead.pop()
        if name not in seen and name in paths:
            seen.add(name)
            ahead += module_imports(paths[name])
    assert len(seen) > 5
    assert not [name for name in seen if unit(name) in set(SERVER_WING) - {"wire"}]


DEVICE = (
    "fedtune.deployment.join",
    "fedtune.deployment.site_check",
    "fedtune.deployment.site_init",
    "fedtune.cli.edge",
    "fedtune.edge",
    "fedtune.probing",
    "fedtune.link.client",
)
"""What `fedtune-edge` starts with: modules, and packages with all that is in them."""
NOT_ON_A_DEVICE = {
    *("torch", "transformers", "peft", "datasets", "pyarrow", "pandas", "flwr", "typer", "rich", "matplotlib"),
    *("sklearn", "scipy", "numba", "onnx", "gguf"),
}
SERVER_ONLY = (
    *("client", "runs", "report", "flower", "api", "rounds.loop", "rounds.admission", "rounds.aggregation"),
    *("rounds.exchange", "link.server", "devices.memory", "simulation.process_pool", "simulation.inprocess"),
    *("simulation.fork_server", "store.run_journal", "model.base", "model.train"),
)
"""Below fedtune: what a server, a simulation or a client with torch needs, and no device."""


def test_a_device_loads_no_torch_and_nothing_of_the_server() -> None:
    runtimes = {"fedtune.edge.onnx_runtime", "fedtune.edge.gguf_runtime"}  # loaded where a bundle needs one of them
    modules = {module(path) for path in HAND_WRITTEN if module(path).startswith(DEVICE)} - runtimes
    assert len(modules) > 20
    code = f"import sys\nimport {', '.join(sorted(modules))}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = set(done.stdout.split())
    assert not {name.partition(".")[0] for name in seen} & NOT_ON_A_DEVICE
    assert not {"onnxruntime", "xllamacpp"} & seen
    server = tuple(f"fedtune.{name}" for name in SERVER_ONLY)
    assert not [name for name in seen if name in server or name.startswith(tuple(f"{one}." for one in server))]


def test_help_is_shown_without_loading_a_heavy_package() -> None:
    assert not loaded("import fedtune.cli.main") & {"torch", "transformers", "datasets", "matplotlib", "pydantic"}
    assert not loaded("import fedtune") & {"numpy", "torch", "typer"}
    assert not loaded("import fedtune.cli.edge") & {"numpy", "torch", "typer", "pydantic", "grpc"}


@pytest.mark.guarantee("G1")
def test_nothing_is_unpickled_and_no_global_generator_is_used() -> None:
    faults = []
    for path in HAND_WRITTEN:
        for line, name in imports(path):
            if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "random"}:
                faults.append(f"{where(path)}:{line}: import of {name}")
        for node in nodes(path):
            if not isinstance(node, ast.Attribute):
                continue
            name = dotted(node)
            drawn = re.fullmatch(r"(np|numpy)\.random\.(?!(Generator|Philox)$)\w+", name)
            seeded = re.fullmatch(r"torch(\.\w+)*\.(manual_seed|manual_seed_all|fork_rng|set_rng_state|seed)", name)
            if name == "torch.load" or drawn or (seeded and where(path) not in SEEDS_TORCH):
                faults.append(f"{where(path)}:{node.lineno}: {name}")
    assert not faults, "\n".join(faults)


def test_a_module_that_seeds_torch_gives_its_generators_back() -> None:
    for place in SEEDS_TORCH:
        names = {dotted(node) for node in nodes(ROOT / place) if isinstance(node, ast.Attribute)}
        if any(re.fullmatch(r"torch(\.\w+)*\.manual_seed", name) for name in names):
            assert "torch.random.fork_rng" in names, place


WHOLESALE = {
    "fedtune/evaluation/confined.py",
    "fedtune/client/own_trainer.py",
    "fedtune/flower/client_app.py",
    "fedtune/edge/tokenizer.py",
    "fedtune/link/client/jobs.py",
    "fedtune/link/client/training_jobs.py",
    "fedtune/link/client/training_server.py",
    "fedtune/simulation/inprocess.py",
    "fedtune/simulation/fork_server.py",
    "fedtune/runs/tracked.py",
    "fedtune/tracking/follow.py",
}
"""May catch any error of a client's work: it is that client's failure (`rounds.failures`) and must not end the run, and
over a network its text must not leave the site. A thread of the link's client must not end in silence,
and leave a site that is connected and works on nothing. The package tokenizers raises no narrower kind. A tracker is
another package and a network, and must not end the run that it follows."""


def test_no_error_is_caught_wholesale() -> None:
    faults = []
    for path in [path for path in HAND_WRITTEN if where(path) not in WHOLESALE]:
        for node in nodes(path):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(one is None or dotted(one) in {"Exception", "BaseException"} for one in caught)
            # To clean up and raise again hides nothing.
            if broad and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None):
                faults.append(f"{where(path)}:{node.lineno}")
    assert not faults, "\n".join(faults)


def test_no_assertion_is_a_tuple_that_always_holds() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    faults = [
        f"{where(path)}:{node.lineno}"
        for path in [*HAND_WRITTEN, *tests]
        for node in nodes(path)
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Tuple)
    ]
    assert not faults, "\n".join(faults)


def test_no_module_is_an_attic() -> None:
    assert not [where(path) for path in HAND_WRITTEN if path.stem in {"utils", "helpers", "common", "misc", "core"}]


@pytest.mark.parametrize("door", ["server", "clients"])
def test_a_door_is_short_and_defines_no_class(door: str) -> None:
    for path in (ROOT / door).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 120, where(path)
        assert not [node for node in nodes(path) if isinstance(node, ast.ClassDef)], where(path)


def test_the_package_does_not_import_its_doors() -> None:
    doors = {"server", "clients", "simulations", "benchmarks", "tests"}
    assert not [
        f"{where(path)}:{line}" for path in HAND_WRITTEN for line, name in imports(path) if name.split(".")[0] in doors
    ]


@pytest.mark.parametrize("folder", ["server", "clients", "simulations", "benchmarks", "proto", "tests"])
def test_a_top_level_folder_says_what_belongs_in_it(folder: str) -> None:
    assert len((ROOT / folder / "README.md").read_text().split()) > 20


def test_simulations_hold_recipes_and_no_python() -> None:
    assert not list((ROOT / "simulations").rglob("*.py"))
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=where)
def test_every_recipe_binds(path: Path) -> None:
    assert fedtune.bind(path).name


def test_every_module_has_its_test() -> None:
    missing = []
    for path in sorted((ROOT / "fedtune").rglob("*.py")):
        if path.stem == "__init__":
            continue
        mirror = ROOT / "tests" / path.relative_to(ROOT / "fedtune").with_name(f"test_{path.name}")
        # A folder that holds one module may have one test file of the folder's name.
        alone = [other for other in path.parent.glob("*.py") if other.stem != "__init__"] == [path]
        if not mirror.exists() and not (alone and mirror.parent.with_name(f"test_{path.parent.name}.py").exists()):
            missing.append(f"{where(path)}: expected {where(mirror)}")
    assert not missing, "\n".join(missing)


def test_every_public_name_can_be_had_and_is_announced_to_type_checkers() -> None:
    for name in fedtune.__all__:
        assert getattr(fedtune, name) is not None
    typed = {name.rpartition(".")[2] for _, name in imports(ROOT / "fedtune" / "__init__.py")}
    assert set(fedtune.__all__) == typed - {"annotations", "import_module", "TYPE_CHECKING", "Any"}
    assert list(fedtune.__all__) == sorted(fedtune.__all__)


def test_the_wheel_holds_the_package_and_no_door() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert built["wheel"] == {"packages": ["fedtune"]}  # else `server` and `clients` would lie in site-packages
    assert {"fedtune", "proto", "README.md", "LICENSE"} <= set(built["sdist"]["include"])


def test_no_file_names_a_path_of_one_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout to tell the project's files from others")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ".proto", ""}:
            assert not re.search(r"(?<![\w.])/(home|root|work|tmp)/\w", path.read_text()), name
