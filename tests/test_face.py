"""The public face, and the floors: what may be imported from where."""

import ast
import dataclasses
import graphlib
import inspect
import pathlib
import re
import subprocess
import sys
import types

import pytest

import ferrum_jax as fj
from ferrum_jax import interfaces, records

PACKAGE = pathlib.Path(fj.__file__).parent

# Each floor's files, as CONTRIBUTING lists them.
CONTRIBUTING = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
FLOORS = [
    tuple(re.findall("`([a-z]+)`", line.split("|")[2]))
    for line in CONTRIBUTING.split("## Floors")[1].split("\n## ")[0].splitlines()
    if line.startswith("|") and "`" in line
]

OPERATIONS = (
    *("allocate", "check_state", "copy_blocks", "extend", "fork", "free", "gather", "init"),
    *("paged_attention", "require", "share", "truncate", "write"),
)


@dataclasses.dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str  # "ops.sequences"; "ops" for ops/__init__.py; "" for the package's own.
    tree: ast.Module

    @property
    def floor(self) -> int:
        if not self.name:
            return len(FLOORS)
        top = self.name.split(".")[0]
        (floor,) = [i for i, names in enumerate(FLOORS) if top in names]
        return floor

    def imports(self, known: set[str]) -> set[str]:
        """The modules of the package that this one imports, wherever it says so."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: imports are absolute"
                for alias in node.names:  # `from package import module` names a module.
                    name = f"{node.module}.{alias.name}"
                    found.add(name if name.removeprefix("ferrum_jax.") in known else node.module)
        inside = {name for name in found if name.split(".")[0] == "ferrum_jax"}
        return {name.removeprefix("ferrum_jax").removeprefix(".") for name in inside}


def read_package() -> dict[str, Module]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, ast.parse(path.read_text(encoding="utf-8")))
    return modules


MODULES = read_package()
IMPORTS = {name: module.imports(set(MODULES)) for name, module in MODULES.items()}
NAMES = pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "ferrum_jax")


# The face.


def test_all_lists_what_users_type_and_the_contract_can_be_imported_beside_it():
    offered = {
        name
        for name, value in vars(fj).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert offered == {*fj.__all__, *interfaces.__all__}
    for module in (fj, interfaces):
        assert list(module.__all__) == sorted(set(module.__all__))
    assert len(fj.__all__) <= 50


def test_the_interfaces_module_has_every_type_of_the_contract():
    defined = {
        name for name, _ in public_definitions(MODULES["interfaces"].tree) if "." not in name
    }
    stats = {name for name in vars(records) if name.endswith(("Stats", "Report"))}
    assert defined | stats <= set(interfaces.__all__)
    for name in interfaces.__all__:
        assert getattr(fj, name) is getattr(interfaces, name)
        assert isinstance(getattr(fj, name), type)


def test_importing_the_package_loads_no_optional_and_no_slow_package():
    code = "import ferrum_jax, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "ferrum_jax" in loaded
    assert not loaded & {"flax", "matplotlib", "numba", "optax", "tqdm"}


def test_every_operation_is_at_the_top():
    for name in OPERATIONS:
        assert name in fj.__all__
        assert callable(getattr(fj, name))


def test_the_manager_fulfils_its_contracts():
    assert not inspect.isabstract(fj.PagedKvCacheManager)
    assert issubclass(fj.PagedKvCacheManager, (fj.KvCacheManager, fj.BlockAllocator))
    for contract in (fj.KvCacheManager, fj.BlockAllocator):
        for method in contract.__abstractmethods__:
            wanted = inspect.signature(getattr(contract, method))
            offered = inspect.signature(getattr(fj.PagedKvCacheManager, method))
            assert list(offered.parameters) == list(wanted.parameters), method


# Words about it.


@NAMES
def test_the_first_line_of_a_module_says_what_it_is_for(name):
    first = MODULES[name].tree.body[0]
    assert isinstance(first, ast.Expr) and first.lineno == 1
    assert ast.get_docstring(MODULES[name].tree).splitlines()[0].endswith((".", ":"))


def public_definitions(node, prefix=""):
    """Every public function, class and method below a module or a class."""
    for child in node.body:
        if any(ast.unparse(d) == "overload" for d in getattr(child, "decorator_list", ())):
            continue  # What it does is said once, below the last one.
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not child.name.startswith("_"):
                yield prefix + child.name, child
                if isinstance(child, ast.ClassDef):
                    yield from public_definitions(child, f"{prefix}{child.name}.")


@NAMES
def test_everything_public_has_a_docstring(name):
    bare = [
        title
        for title, node in public_definitions(MODULES[name].tree)
        if not (ast.get_docstring(node) or "").strip()
    ]
    assert not bare


@NAMES
def test_everything_public_is_annotated(name):
    bare = []
    for title, node in public_definitions(MODULES[name].tree):
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [arg for arg in (node.args.vararg, node.args.kwarg) if arg]
        bare += [f"{title}({arg.arg})" for arg in arguments if not arg.annotation]
        bare += [title] if node.returns is None else []
    assert not [text for text in bare if not text.endswith(("(self)", "(cls)"))]


# The floors.


def test_the_package_has_modules_on_every_floor():
    assert {module.floor for module in MODULES.values()} == set(range(len(FLOORS) + 1))


@NAMES
def test_a_module_imports_only_from_its_floor_and_below(name):
    above = {i for i in IMPORTS[name] if MODULES[i].floor > MODULES[name].floor}
    assert not above


@pytest.mark.parametrize("folder", ["manager", "manager.aio", "manager.device", "manager.pool"])
def test_a_folder_has_at_most_nine_floors(folder):
    """A folder in it counts as one module."""
    units: dict[str, set[str]] = {}
    for name in MODULES:
        if name.startswith(f"{folder}."):
            unit = name.removeprefix(f"{folder}.").split(".")[0]
            inside = {
                i.removeprefix(f"{folder}.") for i in IMPORTS[name] if i.startswith(f"{folder}.")
            }
            units.setdefault(unit, set()).update({i.split(".")[0] for i in inside} - {unit})
    floors: dict[str, int] = {}
    for unit in graphlib.TopologicalSorter(units).static_order():
        floors[unit] = 1 + max((floors[below] for below in units[unit]), default=0)
    assert max(floors.values()) <= 9


def test_no_modules_import_each_other_in_a_circle():
    assert len(list(graphlib.TopologicalSorter(IMPORTS).static_order())) == len(MODULES)


def test_the_reading_of_imports_sees_them_all():
    source = """
import jax
import ferrum_jax as fj
import ferrum_jax.ops.sequences
from ferrum_jax import state
from ferrum_jax.ops import allocate, tables
from ferrum_jax.types import DataType
def later():
    from ferrum_jax.manager.handle import Entry
"""
    assert Module("config", ast.parse(source)).imports(set(MODULES)) == {
        *("", "ops.sequences", "state", "ops", "ops.tables", "types", "manager.handle"),
    }


def test_nothing_reads_the_environment_but_where_machine_code_is_kept():
    for name, module in MODULES.items():
        if name == "foreign.code_cache":  # It serves programs before any object exists.
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv"), name
