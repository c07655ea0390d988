"""The house keeps its order: import directions, no circles, one call of `diffeqsolve`, small files."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("twin", "calibration", "experiments")
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in PACKAGES}
# What each package may import of the house, and what it must never import at all.
ALLOWED = {"twin": {"twin"}, "calibration": {"twin", "calibration"}, "experiments": set(PACKAGES)}
FORBIDDEN = {
    "twin": {
        "optax",
        "matplotlib",
        "xarray",
        "zarr",
        "h5py",
        "rich",
        "click",
        "pathlib",
        "os",
        "tomllib",
        "json",
        "csv",
    },
    "calibration": {"matplotlib", "xarray", "zarr", "rich", "click"},
    "experiments": set(),
}
# Files that may import one of those all the same, where they need it: this one opens what xarray writes.
EXCEPTIONS = {"lab_formats.py": {"xarray"}}


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_at_top(path: Path) -> set[str]:
    """The same, of statements that run on import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    for path in FILES[package]:
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots & set(PACKAGES) <= ALLOWED[package], path
        assert not roots & FORBIDDEN[package] - EXCEPTIONS.get(path.name, set()), path


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles(package):
    modules = {f"{package}.{path.stem}": path for path in FILES[package] if path.stem != "__init__"}
    graph = {name: {other for other in imported_at_top(path) if other in modules} for name, path in modules.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circular import: {error.args[1]}")


def test_files_with_an_exception_import_it_only_where_it_is_needed():
    for path in (path for package in PACKAGES for path in FILES[package] if path.name in EXCEPTIONS):
        assert not {name.split(".")[0] for name in imported_at_top(path)} & EXCEPTIONS[path.name]


def test_one_function_calls_diffeqsolve():
    calls = []
    for package in PACKAGES:
        # What the benchmarks compare with calls what it likes.
        for path in (path for path in FILES[package] if path.name != "peers.py"):
            for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(function, ast.FunctionDef):
                    for node in ast.walk(function):
                        if isinstance(node, ast.Call) and "diffeqsolve" in ast.unparse(node.func):
                            calls.append((path.name, function.name))
    assert calls == [("dynamics.py", "_integrate")]


def test_public_things_have_docstrings():
    for package in ("twin", "calibration"):
        for path in FILES[package]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_modules_are_small():
    for package in PACKAGES:
        for path in FILES[package]:
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path


def test_no_file_is_large():
    places = [ROOT / name for name in (*PACKAGES, "tests", "docs") if (ROOT / name).exists()]
    files = [p for place in places for p in place.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.name: p.stat().st_size for p in files if p.stat().st_size > 2**20} == {}
