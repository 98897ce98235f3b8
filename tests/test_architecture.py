"""The rules that keep the house in order."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import blip2_search

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "indexes": set(),
    "retrieval": {"indexes"},
    "cli": {"retrieval", "indexes"},
    "benchmarks": {"retrieval", "indexes", "cli"},
}


def rooms_imported(file: Path, room: str) -> set[str]:
    """Return the folders of the package that a file imports from, its own excepted."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.level == 1:
                continue
            if node.level == 2:
                rooms.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms.update(name.split(".")[1] for name in names if name.startswith("blip2_search."))
    return rooms - {room}


def test_imports_flow_one_way():
    for room, allowed in MAY_IMPORT.items():
        for file in (ROOT / room).rglob("*.py"):
            assert rooms_imported(file, room) <= allowed, file


def test_the_direction_test_sees_a_relative_import(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text("from ..cli.app import main\n")
    assert rooms_imported(file, "indexes") == {"cli"}


def test_indexes_know_no_model():
    for file in (ROOT / "indexes").glob("*.py"):
        assert not re.search(r"^\s*(import|from) (torch|transformers|timm)", file.read_text(), re.M)


def test_every_folder_of_code_is_shipped():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = set(config["tool"]["setuptools"]["packages"])
    on_disk = {
        f"blip2_search.{file.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for room in MAY_IMPORT
        for file in (ROOT / room).rglob("__init__.py")
    }
    assert shipped == on_disk | {"blip2_search"}


def test_public_names_exist_and_are_sorted():
    assert blip2_search.__all__ == sorted(blip2_search.__all__)
    for name in blip2_search.__all__:
        assert getattr(blip2_search, name) is not None
    assert dir(blip2_search) == blip2_search.__all__


def test_changelog_has_this_version():
    assert f"## {blip2_search.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_the_package_is_free():
    code = "import blip2_search, sys; print([m for m in ('torch', 'pyarrow', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
