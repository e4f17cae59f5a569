"""What no file of the repository may hold, and what every package folder must."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "spanwise"
ENTRY_POINTS = ("scripts/demo", "scripts/test", "scripts/check", ".ci/run")

# Spelled so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(rb"(?<![\w.~}-])/(?:work|root|home/(?!<)[\w.-]+)" + rb"/")
REGISTRY = re.compile(
    rb"pypi\.(?:org|python)|python" + rb"hosted\.org|download\.py" + rb"torch\.org|registry\.npm"
    rb"|(?:index-" + rb"url|find-" + rb"links)\b",
    re.IGNORECASE,
)


def repository_files(root: Path) -> list[Path]:
    """What git tracks or would take up; without git, all but hidden and built folders."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        answer = subprocess.run(listing, cwd=root, capture_output=True)
    except FileNotFoundError:
        return list(_walk(root))
    if answer.returncode != 0:
        return list(_walk(root))
    paths = (root / os.fsdecode(name) for name in answer.stdout.split(b"\0") if name)
    return [path for path in paths if path.is_file()]


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if (name == ".ci" or not name.startswith("."))
            and name not in ("build", "dist", "tmp", "__pycache__")
            and not name.endswith(".egg-info")
        ]
        yield from (Path(folder) / name for name in files if not name.endswith(".log"))


def foreign_traces(path: Path) -> list[str]:
    """Machine paths and registry hosts in one file, as `line: text`."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        for pattern in (MACHINE_PATH, REGISTRY):
            if match := pattern.search(line):
                found.append(f"{number}: {match.group().decode()}")
    return found


def bad_statements(source: str) -> list[str]:
    """Sleeps, and `except` without a name, in one module, as `line: text`."""
    return [text for node in ast.walk(ast.parse(source)) if (text := _bad_statement(node))]


def _bad_statement(node: ast.AST) -> str | None:
    match node:
        case ast.ExceptHandler(type=None, lineno=line):
            return f"{line}: except that names nothing"
        case ast.Attribute(value=ast.Name(id="time"), attr="sleep", lineno=line):
            return f"{line}: time.sleep where an event is meant"
        case ast.ImportFrom(module="time", names=names, lineno=line):
            if any(alias.name == "sleep" for alias in names):
                return f"{line}: time.sleep where an event is meant"
    return None


def folders_without_init(package: Path) -> list[str]:
    """Folders that hold modules, or packages, but are no package themselves."""
    folders = {folder for path in package.rglob("*.py") for folder in path.parents}
    inside = {folder for folder in folders if folder.is_relative_to(package)}
    return sorted(str(folder) for folder in inside if not (folder / "__init__.py").exists())


def test_no_file_holds_a_machine_path_or_a_registry() -> None:
    files = repository_files(ROOT)
    assert PACKAGE / "errors.py" in files
    found = {str(path.relative_to(ROOT)): foreign_traces(path) for path in files}
    assert {name: traces for name, traces in found.items() if traces} == {}


def test_no_module_sleeps_or_swallows() -> None:
    modules = list(PACKAGE.rglob("*.py"))
    assert modules
    found = {str(path.relative_to(ROOT)): bad_statements(path.read_text()) for path in modules}
    assert {name: statements for name, statements in found.items() if statements} == {}


def test_every_package_folder_is_a_package() -> None:
    assert folders_without_init(PACKAGE) == []


def test_the_entry_points_can_be_run() -> None:
    assert [name for name in ENTRY_POINTS if not os.access(ROOT / name, os.X_OK)] == []


@pytest.mark.parametrize(
    "line",
    [
        "open('/" + "work/main/x')",
        "cache = /" + "root/.cache",
        "/home/" + "ann/model",
        "https://pypi" + ".org/simple",
        "https://download.py" + "torch.org/whl/cpu",
        "pip install --extra-index-" + "url x",
    ],
)
def test_a_foreign_trace_is_found(tmp_path: Path, line: str) -> None:
    path = tmp_path / "notes.md"
    path.write_text(f"fine\n{line}\n")
    assert len(foreign_traces(path)) == 1


# Put together here, so that this file holds no such path itself.
@pytest.mark.parametrize(
    "line",
    [
        "frame/" + "work/x",
        "/home/<user>/models",
        "~/" + "root/x",
        "the work/root of it",
        "/workers/",
    ],
)
def test_a_harmless_line_passes(tmp_path: Path, line: str) -> None:
    path = tmp_path / "notes.md"
    path.write_text(line)
    assert foreign_traces(path) == []


@pytest.mark.parametrize(
    "source",
    ["import time\ntime.sleep(1)", "from time import sleep", "try:\n    f()\nexcept:\n    pass"],
)
def test_a_bad_statement_is_found(source: str) -> None:
    assert len(bad_statements(source)) == 1


def test_a_named_except_passes() -> None:
    assert bad_statements("try:\n    f()\nexcept ValueError:\n    raise") == []


def test_a_folder_without_init_is_found(tmp_path: Path) -> None:
    (tmp_path / "room" / "deep").mkdir(parents=True)
    (tmp_path / "room" / "deep" / "a.py").touch()
    (tmp_path / "room" / "__init__.py").touch()
    (tmp_path / "__init__.py").touch()
    assert folders_without_init(tmp_path) == [str(tmp_path / "room" / "deep")]


def test_files_are_found_without_git(tmp_path: Path) -> None:
    for name in ("a.py", ".venv/b.py", ".ci/run", "build/c.py", "src/x.egg-info/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {str(path.relative_to(tmp_path)) for path in _walk(tmp_path)}
    assert found == {"a.py", ".ci/run"}
