"""The tree, its packaging, and which part may import which."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from built_support import OUTSIDE_MAKE, PLUGIN_FOLDERS, ROOT, build, copy_sources, in_one_process, run_python

# Lower parts first; a part imports from its own row and those above. Dotted names are below `moert`; "" is its face.
LAYERS = (
    ("config", "errors", "types", "plugins", "torch_threads", "machine_code", "_C"),
    ("kernels",),
    ("tiers", "formats"),
    ("device",),
    ("policies", "predictors", "schedule"),
    ("turnover", "trial", "speculation"),
    ("residency",),
    ("plan", "planning", "pressure", "simulate", "trace", "suit", "report", "predict", "training"),
    ("runtime",),
    ("calibration",),
    ("hf",),
    ("api",),
    ("",),
    ("cli", "__main__"),
)
RANKS = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

# What decides sees ids, sizes and costs, so that the same object runs live and in the simulator.
WITHOUT_TORCH = (
    "policies",
    "residency",
    "turnover",
    "trial",
    "speculation",
    "schedule",
    "simulate",
    "suit",
    "report",
    "predict",
    "plan",
    "planning",
    "pressure",
    "config",
    "errors",
    "types",
    "plugins",
    "machine_code",
)


def modules() -> dict[str, Path]:
    """Every module of the package by its name once installed."""
    found = {}
    for folder, package in (("moert", "moert"), *((name, f"moert.{name}") for name in PLUGIN_FOLDERS)):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


MODULES = modules()


def imported_names(name: str, path: Path) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it the statement stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = package.split(".")
                source = ".".join([*base[: len(base) - node.level + 1], *filter(None, [source])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in MODULES or whole == "moert._C" else source


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name: str) -> None:
    part = part_of(name)
    assert part in RANKS, f"{name} belongs to no layer; give it a place in LAYERS"
    for imported in imported_names(name, MODULES[name]):
        if is_within(imported, "moert"):
            assert RANKS[part_of(imported)] <= RANKS[part], f"{name} imports {imported}, which is above it"
        if is_within(imported, "transformers"):
            assert part == "hf", f"{name} imports {imported}; only moert/hf may"
        if is_within(imported, "torch"):
            assert part not in WITHOUT_TORCH, f"{name} imports {imported}; what decides sees no tensor"
        assert imported.split(".")[0] not in PLUGIN_FOLDERS, f"{name} imports {imported}, not moert.{imported}"


def test_what_decides_brings_in_no_torch() -> None:
    names = [name for name in MODULES if part_of(name) in WITHOUT_TORCH]
    assert "moert.policies.lru" in names
    loads = "\n".join(f"import {name}" for name in names)
    assert run_python(f"{loads}\nimport sys; print('torch' in sys.modules)", ROOT) == "False\n"


def test_import_of_moert_is_light() -> None:
    code = "import moert, sys; print(sorted({'torch', 'transformers', 'numba', 'numpy'} & set(sys.modules)))"
    assert run_python(code, ROOT) == "[]\n"


def test_the_face_offers_what_it_lists() -> None:
    import moert

    for name in moert.__all__:
        assert getattr(moert, name) is not None
        assert name in dir(moert)
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = moert.nothing_of_the_kind
    assert issubclass(moert.CapacityError, moert.MoertError)
    namespace: dict[str, object] = {}
    exec("from moert import *", namespace)
    assert set(moert.__all__) <= namespace.keys()


def test_the_configuration_by_itself_registers_the_quantizer() -> None:
    """`from_pretrained(..., quantization_config=moert.OffloadConfig())` must work with no other use of moert."""
    code = (
        "import moert; moert.OffloadConfig\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; print('moert' in known)"
    )
    assert run_python(code, ROOT) == "True\n"


@pytest.mark.parametrize("folder", PLUGIN_FOLDERS)
def test_plugin_folders_have_only_a_docstring_at_their_face(folder: str) -> None:
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


def test_transformers_works_where_our_kernels_folder_shadows_its_kernels_package() -> None:
    """With the repository on sys.path, transformers' look-up of the `kernels` package finds our folder."""
    code = """
import sys
import kernels
import transformers
import transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available
print(kernels.__file__)
print(is_kernels_available())
print(sorted(name for name in sys.modules if name.split(".")[0] in ("kernels", "predictors", "moert")))
print(sorted(name for name in vars(kernels) if not name.startswith("__")))
"""
    file, available, brought_in, public = run_python(code, ROOT).splitlines()
    assert Path(file) == ROOT / "kernels" / "__init__.py"
    assert available == "False", "our folder was taken for HuggingFace's package"
    assert brought_in == "['kernels']"
    assert public == "[]"


def test_the_build_needs_setuptools_only() -> None:
    allowed = {"__future__", "concurrent", "os", "platform", "sysconfig", "pathlib", "setuptools"}
    assert {name.split(".")[0] for name in imported_names("setup", ROOT / "setup.py")} <= allowed
    source = (ROOT / "pyproject.toml").read_text()
    requires = source.split("requires = ", 1)[1].splitlines()[0]
    assert ast.literal_eval(requires) == ["setuptools>=77"]


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("source"))


@pytest.fixture
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(tmp_path_factory.getbasetemp()).wheel)


@in_one_process
@pytest.mark.timeout(900)
def test_one_wheel_serves_every_supported_python(wheel: zipfile.ZipFile) -> None:
    assert "-cp310-abi3-" in Path(wheel.filename or "").name


@in_one_process
@pytest.mark.timeout(900)
def test_the_wheel_has_the_whole_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    expected = {
        f"{name.replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
        for name, path in MODULES.items()
    }
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "moert" / "data" / "demo").glob("*") if path.is_file()}
    assert expected | data | {"moert/py.typed", "moert/_C.pyi", "moert/_C.abi3.so"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"moert"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@in_one_process
@pytest.mark.timeout(900)
def test_an_installed_tree_has_its_plugin_folders(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        "import moert, moert.kernels, moert.predictors, moert._C\n"
        "for module in (moert, moert.kernels, moert.predictors, moert._C): print(module.__file__)\n"
        "print(moert._C.cpu_features().keys() >= {'avx2', 'neon'})"
    )
    *files, works = run_python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    for file in files:
        assert Path(file).is_relative_to(tmp_path / "site"), file
    assert works == "True"


def make_plan(tree: Path, target: str) -> list[str]:
    """The commands that `make target` would run on a fresh machine."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    child = subprocess.run(
        ["make", "-n", target], cwd=tree, capture_output=True, text=True, timeout=60, check=True, env=OUTSIDE_MAKE
    )
    return child.stdout.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize(("target", "last"), [("demo", "moert demo"), ("test", "-m pytest"), ("venv", "touch")])
def test_a_fresh_machine_gets_the_pinned_torch_before_anything_else(source_tree: Path, target: str, last: str) -> None:
    plan = make_plan(source_tree, target)
    installs = [line for line in plan if " install " in line and "-m venv" not in line]
    assert installs[0].endswith('install "torch==2.13.0"')
    editable = [line for line in installs if "-e " in line]
    assert len(editable) == 1
    # Without the constraint a newer requirement could have pip replace the torch that is there.
    assert "-c .venv/constraints.txt" in editable[0]
    assert any("constraints.txt" in line and "torch==" in line for line in plan[: plan.index(editable[0])])
    assert last in plan[-1]


def test_set_up_is_not_repeated(source_tree: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(source_tree, tree, ignore=shutil.ignore_patterns("build", "dist", "*.egg-info"))
    (tree / ".venv" / "bin").mkdir(parents=True)
    for stamp in ("bin/python", ".torch", ".installed"):
        (tree / ".venv" / stamp).touch()
    assert not any("install" in line for line in make_plan(tree, "test"))
    os.utime(tree / "csrc" / "module.cpp", (2**32, 2**32))
    installs = [line for line in make_plan(tree, "test") if " install " in line]
    assert len(installs) == 1, "changed C++ sources are compiled again, torch is left alone"


def test_a_machine_can_ask_for_its_own_torch(source_tree: Path) -> None:
    child = subprocess.run(
        ["make", "-n", "venv", "TORCH=torch"],
        cwd=source_tree,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=OUTSIDE_MAKE,
    )
    assert 'install "torch"' in child.stdout
    assert "2.13.0" not in child.stdout
