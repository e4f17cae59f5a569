"""The law of the rooms: which module may import what. Read from the source; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "spanwise"

# A room may import those to its left.
BASE = ("errors", "types", "config")
PURE = (*BASE, "layout", "cost", "scheduler", "control", "sim", "planner")
ORDER = (
    *PURE,
    *("comm", "device", "embedded", "model", "runner", "worker", "engine", "jobs"),
)
# Above all of them, and strangers to one another; only the CLI starts the others, when asked to.
FACES = ("server", "bench", "quantize", "cli")
ROOMS = frozenset(ORDER + FACES)
SCHEDULING = frozenset({"scheduler", "control", "sim", "planner"})
STRANGERS = {"model": SCHEDULING, "runner": SCHEDULING}


@dataclass(frozen=True)
class Ban:
    """Modules that only some rooms may use, by import or as an attribute."""

    modules: tuple[str, ...]
    allowed: frozenset[str]
    reason: str

    def holds_for(self, room: str, name: str) -> bool:
        banned = any(name == module or name.startswith(module + ".") for module in self.modules)
        return banned and room not in self.allowed


BANS = (
    Ban(
        ("torch", "transformers"),
        ROOMS - set(PURE) - {"embedded"},
        "this room knows nothing of torch",
    ),
    Ban(
        (
            *("socket", "select", "selectors", "ssl", "zmq", "asyncio", "threading"),
            *("subprocess", "multiprocessing", "concurrent", "time", "datetime"),
        ),
        ROOMS - set(PURE),
        "a pure room has no clocks, sockets, threads or processes",
    ),
    Ban(
        ("subprocess", "multiprocessing"),
        ROOMS - {"model", "runner"},
        "this room knows nothing of processes",
    ),
    Ban(
        ("fastapi", "starlette", "uvicorn", "httpx2", "aiohttp"),
        frozenset(FACES),
        "only a face knows of HTTP",
    ),
    Ban(("torch.distributed",), frozenset({"comm"}), "only comm uses torch.distributed"),
    Ban(("torch.cuda",), frozenset({"device"}), "only device uses torch.cuda"),
    Ban(
        ("pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"),
        frozenset(),
        "pickle runs what it reads",
    ),
)


@dataclass(frozen=True)
class Use:
    """One dotted name a module uses: imported, or reached as an attribute of an imported name."""

    name: str
    line: int
    imported: bool
    in_function: bool
    for_typing: bool


class _Uses(ast.NodeVisitor):
    """Collects every `Use` of one module, which lies in `package` (dotted)."""

    def __init__(self, package: str) -> None:
        self.found: list[Use] = []
        self._package = package.split(".")
        self._bound: dict[str, str] = {}
        self._functions = 0
        self._typing = 0

    def _add(self, name: str, node: ast.AST, imported: bool = True) -> None:
        line = getattr(node, "lineno", 0)
        self.found.append(Use(name, line, imported, self._functions > 0, self._typing > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)
            first = alias.name.split(".")[0]
            self._bound[alias.asname or first] = alias.name if alias.asname else first

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = [node.module] if node.module else []
        if node.level:
            source = self._package[: len(self._package) - node.level + 1] + source
        for alias in node.names:
            name = ".".join([*source, alias.name]).removesuffix(".*")
            self._add(name, node)
            self._bound[alias.asname or alias.name] = name

    def visit_Attribute(self, node: ast.Attribute) -> None:
        attributes: list[str] = []
        value: ast.expr = node
        while isinstance(value, ast.Attribute):
            attributes.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id in self._bound:
            self._add(".".join([self._bound[value.id], *reversed(attributes)]), node, False)
        self.visit(value)

    def visit_Call(self, node: ast.Call) -> None:
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._add(name.value, node)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        is_typing = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self._typing += is_typing
        for statement in node.body:
            self.visit(statement)
        self._typing -= is_typing
        self.visit(node.test)
        for statement in node.orelse:
            self.visit(statement)

    def _visit_function(self, node: ast.AST) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function  # noqa: N815


def violations(package: Path) -> list[str]:
    """Every breach of the law in a package that stands for `spanwise`, as `file:line: what`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        room = place.parts[0].removesuffix(".py")
        if room not in ROOMS | {"__init__", "__main__"}:
            found.append(f"{place}:1: {room} is no room of the law")
            continue
        uses = _Uses(".".join(["spanwise", *place.parts[:-1]]))
        uses.visit(ast.parse(path.read_text(), filename=str(path)))
        breaches = {(use.line, text) for use in uses.found for text in _breaches(room, use)}
        found += [f"{place}:{line}: {text}" for line, text in sorted(breaches)]
    return found


def _breaches(room: str, use: Use) -> Iterator[str]:
    yield from (f"{_top(use, ban)}: {ban.reason}" for ban in BANS if ban.holds_for(room, use.name))
    root, _, rest = use.name.partition(".")
    if use.imported and root == "spanwise":
        breach = _direction(room, rest.split(".")[0], use)
        if breach:
            yield f"imports {use.name}: {breach}"


def _top(use: Use, ban: Ban) -> str:
    """The banned module a use falls under, so that one line breaks one ban once."""
    return next(module for module in ban.modules if f"{use.name}.".startswith(module + "."))


def _direction(room: str, target: str, use: Use) -> str | None:
    """What is wrong with `room` importing `target`, or None."""
    if target == room:
        return None
    if target not in ROOMS:
        return "name the room it comes from"
    if room == "__init__":
        light = target in BASE or use.in_function or use.for_typing
        return None if light else "importing the package must stay light; do it in a function"
    if room == "__main__":
        return None if target == "cli" else "__main__ only calls the CLI"
    if room in FACES:
        apart = target in FACES and not (room == "cli" and use.in_function)
        return "faces know nothing of each other" if apart else None
    if target in FACES or ORDER.index(target) > ORDER.index(room):
        return f"{target} lies above {room}"
    if target in STRANGERS.get(room, ()):
        return f"{room} knows nothing of scheduling"
    return None


def test_the_package_keeps_the_law() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 5, "the package was not found"
    assert violations(PACKAGE) == []


def _breaches_of(tmp_path: Path, place: str, source: str) -> list[str]:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return violations(tmp_path)


BROKEN = [
    ("types/plan.py", "import spanwise.layout.grid", "layout lies above types"),
    ("errors.py", "from spanwise.types.plan import StepPlan", "types lies above errors"),
    ("layout/grid.py", "from spanwise.model import build", "model lies above layout"),
    ("layout/grid.py", "from spanwise import model", "model lies above layout"),
    ("layout/grid.py", "from ..model.build import x", "model lies above layout"),
    ("layout/deep/grid.py", "from ...cost import facts", "cost lies above layout"),
    ("scheduler/a.py", "def f():\n    from spanwise.engine import llm", "engine lies above"),
    ("cost/a.py", "if TYPE_CHECKING:\n    from spanwise.sim import clock", "sim lies above"),
    ("comm/a.py", "from spanwise.embedded import EMBEDDED", "embedded lies above comm"),
    ("engine/a.py", "from spanwise.cli.main import main", "cli lies above engine"),
    ("model/a.py", "from spanwise.scheduler import queue", "knows nothing of scheduling"),
    ("runner/a.py", "from spanwise.planner import search", "knows nothing of scheduling"),
    ("server/a.py", "from spanwise.cli import main", "faces know nothing"),
    ("bench/a.py", "def f():\n    import spanwise.server", "faces know nothing"),
    ("cli/a.py", "from spanwise.server import app", "faces know nothing"),
    ("engine/a.py", "from spanwise import LLM", "name the room"),
    ("engine/a.py", "import spanwise", "name the room"),
    ("extra/a.py", "x = 1", "extra is no room"),
    ("helpers.py", "x = 1", "helpers is no room"),
    ("__init__.py", "from spanwise.engine.llm import LLM", "must stay light"),
    ("__init__.py", "import torch", "nothing of torch"),
    ("__main__.py", "from spanwise.engine.llm import LLM", "only calls the CLI"),
    *((f"{room}/a.py", "import torch", "nothing of torch") for room in PURE),
    ("embedded/__init__.py", "import torch", "nothing of torch"),
    ("cost/a.py", "from transformers import AutoConfig", "nothing of torch"),
    ("cost/a.py", "import importlib\nimportlib.import_module('torch')", "nothing of torch"),
    ("cost/a.py", "def f():\n    import torch.nn as nn", "nothing of torch"),
    ("scheduler/a.py", "import time", "no clocks"),
    ("scheduler/a.py", "from time import monotonic", "no clocks"),
    ("control/a.py", "import socket", "no clocks"),
    ("sim/a.py", "import asyncio", "no clocks"),
    ("planner/a.py", "import threading", "no clocks"),
    ("config/a.py", "import subprocess", "no clocks"),
    ("model/a.py", "import multiprocessing.shared_memory", "nothing of processes"),
    ("engine/a.py", "import fastapi", "only a face"),
    ("worker/a.py", "import torch.distributed as dist", "only comm"),
    ("worker/a.py", "from torch import distributed", "only comm"),
    ("worker/a.py", "from torch.distributed import TCPStore", "only comm"),
    ("device/a.py", "import torch\ntorch.distributed.is_available()", "only comm"),
    ("model/a.py", "import torch as t\nx = t.cuda.device_count()", "only device"),
    ("comm/a.py", "import torch\ndef f(s: torch.cuda.Stream): ...", "only device"),
    ("runner/a.py", "import torch.cuda.graphs", "only device"),
    ("worker/a.py", "import pickle", "pickle runs"),
    ("jobs/a.py", "from pickle import loads", "pickle runs"),
]


@pytest.mark.parametrize(("place", "source", "reason"), BROKEN)
def test_a_breach_is_reported_once(tmp_path: Path, place: str, source: str, reason: str) -> None:
    breaches = _breaches_of(tmp_path, place, source)
    assert len(breaches) == 1, breaches
    assert reason in breaches[0]
    assert breaches[0].startswith(f"{place}:")


KEPT = [
    ("types/a.py", "from spanwise.errors import InputError\nfrom spanwise.types.b import B"),
    ("layout/a.py", "from . import b\nfrom .b import c\nfrom ..types.plan import StepPlan"),
    ("planner/a.py", "from spanwise.sim import clock\nimport timeit_like, math"),
    ("comm/a.py", "import torch\nimport torch.distributed as dist\ndist.barrier()\nimport time"),
    ("device/a.py", "import torch\ntorch.cuda.synchronize()"),
    ("model/a.py", "import torch\nfrom spanwise.embedded import EMBEDDED\ntorch.cudax = 1"),
    ("engine/a.py", "import asyncio, threading\nfrom spanwise.scheduler.scheduler import S"),
    ("server/a.py", "import fastapi\nfrom spanwise.engine.llm import LLM"),
    ("cli/a.py", "def run():\n    from spanwise.server import app"),
    ("__init__.py", "from spanwise.types.sampling import SamplingParams"),
    ("__init__.py", "def __getattr__(name):\n    from spanwise.engine.llm import LLM"),
    ("__init__.py", "if TYPE_CHECKING:\n    from spanwise.engine.llm import LLM"),
    ("__main__.py", "from spanwise.cli.main import main"),
]


@pytest.mark.parametrize(("place", "source"), KEPT)
def test_what_the_law_allows_passes(tmp_path: Path, place: str, source: str) -> None:
    assert _breaches_of(tmp_path, place, source) == []
