"""Imports point one way (the ranks of the architecture), and some things are reached from one place only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reference import REPO

# Lower never imports higher; what shares a number may import each other.
RANKS = {
    "executor.errors": 0,
    "executor.host": 0,
    "executor.doctor": 1,
    "executor.schedule": 1,
    "executor.device": 1,
    "executor.media": 1,
    "executor.checkpoint": 2,
    "executor.recipe": 3,
    "executor.prompt": 3,
    "executor.recipe.settle": 4,
    "executor.recipe.on_paper": 4,
    "executor.parallel": 4,
    "executor.quant": 5,
    "executor.quant.choose": 7,
    "executor.quant.check": 7,
    "executor.quant.sizes": 2,
    "executor.layers": 6,
    "executor.engine": 7,
    "models.registry": 3,  # and every models.FAMILY.config: sizes, no module of a model
    "models.published": 3,
    "models": 8,
    "dataset": 8,
    "emulator": 8,
    "executor.serve": 8,
    "executor.launch": 8,
    "executor.cluster": 9,
    "executor.command_line": 9,
    "executor.calibrate": 9,
    "executor.capacity": 9,
    "executor.bench": 10,
    "executor.evaluate": 9,
    "executor.commands": 11,
    "executor.__main__": 12,
}
SOURCES = ("executor", "models", "dataset", "emulator")
SCRIPTS = ("executor/scripts", "models/tiny")  # run by themselves; of the product dataset/tiny_world.py takes the world
ENVIRONMENT = ("executor/host/env.py", "executor/__main__.py")
OBJECT_COLLECTIVES = [
    *(f"{verb}_object" for verb in ("all_gather", "gather")),
    *(f"{verb}_object_list" for verb in ("broadcast", "scatter", "send", "recv")),
]
NPU_PACKAGES = ("torch_npu", "torchair")
NPU_FOLDERS = ("executor/device/npu", "emulator")


def product_files(root: Path = REPO) -> list[Path]:
    files = [path for source in SOURCES for path in sorted((root / source).rglob("*.py"))]
    return [path for path in files if not path.relative_to(root).as_posix().startswith(SCRIPTS)]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, in functions too; `from package import name` names both."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide where a thing comes from"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def rank(module: str) -> int | None:
    """The rank of the longest known prefix of a dotted name. The families' config.py rank as the registry does."""
    parts = module.split(".")
    if parts[0] == "models" and parts[2:3] == ["config"]:
        return RANKS["models.registry"]
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in RANKS:
            return RANKS[".".join(parts[:length])]
    return None


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def upward_imports(root: Path = REPO) -> list[str]:
    found = []
    for path in product_files(root):
        own = rank(module_name(path, root))
        for line, module in imported(path):
            other = rank(module)
            if own is not None and other is not None and other > own:
                found.append(f"{path.relative_to(root)}:{line} imports {module}")
    return found


def test_no_import_points_upward():
    assert upward_imports() == []


def test_every_file_has_a_rank():
    unranked = [str(path.relative_to(REPO)) for path in product_files() if rank(module_name(path, REPO)) is None]
    assert [name for name in unranked if name != "executor/__init__.py"] == []


@pytest.mark.parametrize(
    "file, line",
    [
        ("executor/schedule/bad.py", "from executor.engine import engine"),
        ("executor/layers/bad.py", "import models.qwen3_vl.model"),
        ("executor/recipe/schema.py", "def late():\n    from executor.recipe.settle import prepare"),
        ("models/qwen3_vl/bad.py", "from executor import commands"),
        ("models/qwen3_vl/config.py", "from executor.recipe.settle import prepare"),
    ],
)
def test_an_upward_import_is_found(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    (found,) = upward_imports(tmp_path)
    assert found.startswith(file)


def test_the_scheduler_knows_no_torch():
    for path in (REPO / "executor" / "schedule").glob("*.py"):
        for line, module in imported(path):
            assert module.split(".")[0] not in ("torch", "transformers"), f"{path}:{line}"


def test_a_recipe_is_settled_before_torch_is_imported():
    """It takes seconds, which a launcher and a refusal have no use for."""
    code = "import sys, executor.recipe.settle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=120).returncode == 0


def test_npu_packages_stay_in_their_folders():
    for path in product_files():
        if not path.relative_to(REPO).as_posix().startswith(NPU_FOLDERS):
            for line, module in imported(path):
                assert module.split(".")[0] not in NPU_PACKAGES, f"{path}:{line}"


def test_nothing_that_comes_over_a_network_or_from_a_file_is_unpickled():
    """Plans, rows and weights travel as numbers and JSON: pickle runs whatever code it is sent."""
    for path in product_files():
        for line, module in imported(path):
            assert module.split(".")[0] not in ("pickle", "marshal", "shelve", "dill", "cloudpickle"), f"{path}:{line}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr == "load"
                assert not of_torch and node.attr not in OBJECT_COLLECTIVES, f"{path}:{node.lineno}: {node.attr}"


def test_the_environment_is_read_in_one_place():
    for path in product_files():
        if path.relative_to(REPO).as_posix() in ENVIRONMENT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            assert not used, f"{path}:{node.lineno} reads the environment; executor/host/env.py does"


def test_model_families_do_not_know_each_other():
    families = [path.name for path in (REPO / "models").iterdir() if (path / "runner.py").is_file()]
    assert len(families) >= 2
    for family in families:
        for path in (REPO / "models" / family).glob("*.py"):
            for line, module in imported(path):
                if module.startswith("models."):
                    assert module.split(".")[1] == family, f"{path}:{line} imports {module}"


def test_importing_a_package_does_no_work():
    """`__init__.py`: nothing, or a docstring and one literal table."""
    for source in (*SOURCES, "tests"):
        for path in (REPO / source).rglob("__init__.py"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            rest = [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
            assert len(rest) <= 1, path
            for node in rest:
                assert isinstance(node, ast.Assign | ast.AnnAssign), path
                ast.literal_eval(node.value)
