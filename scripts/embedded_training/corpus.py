"""The data: the source of the Python standard library, as files and as chats."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"),
    *("test", "tests", "idle_test", "ensurepip"),
}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "test_")  # names of a folder or of a file
SKIPPED_FILES = {"html/entities.py", "locale.py", "stringprep.py", "__phello__/spam.py"}  # tables


def wanted(relative: Path) -> bool:
    """Whether this file of the standard library is part of the data."""
    return (
        relative.as_posix() not in SKIPPED_FILES
        and SKIPPED_FOLDERS.isdisjoint(relative.parts)
        and not any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts)
    )


def held_out(relative: Path) -> bool:
    """Whether a file is kept from training: 3 in 100, chosen by a hash of its path."""
    return int(hashlib.sha256(relative.as_posix().encode()).hexdigest(), 16) % 100 < 3


def read_corpus() -> tuple[list[str], list[str]]:
    """The texts to train on and the held-out ones, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    held: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if wanted(relative):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                (held if held_out(relative) else train).append(text)
    return train, held


def chat_texts(source: str) -> Iterator[tuple[str, str]]:
    """Questions and answers from one file: 'Write `def f(x)`: <its docstring>' and the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            code = ast.unparse(node)
            if len(code) <= 600 and node.name.isidentifier():
                what = " ".join(doc.split("\n\n")[0].split())
                yield (
                    f"Write a Python function `{node.name}({ast.unparse(node.args)})`: {what}",
                    f"{code}\n",
                )
