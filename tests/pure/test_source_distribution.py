"""pip can compile the C kernels from a source distribution: all of their files are in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "src" / "spanwise" / "device" / "kernels"


def test_the_files_of_the_kernels_are_in_it(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    nothing_is_compiled = {"CC": "none"}
    subprocess.run(command, cwd=ROOT, env=os.environ | nothing_is_compiled, check=True)
    listed = (tmp_path / "spanwise.egg-info" / "SOURCES.txt").read_text().splitlines()
    files = {str(path.relative_to(ROOT)) for path in KERNELS.iterdir()}
    assert {path.suffix for path in KERNELS.iterdir()} == {".c", ".h"}
    assert files - set(listed) == set()
    assert "setup.py" in listed
