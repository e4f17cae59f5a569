"""The C kernels for CPU devices; all else about the package stands in pyproject.toml.

They make a plain shared library that knows nothing of Python: `device/native.py` loads it with
ctypes. Where it cannot be built, the package installs without it and computes with torch alone.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError

KERNELS = "src/spanwise/device/kernels"
# No -march: the kernels look at the processor they run on.
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fopenmp-simd", "-fvisibility=hidden"]
# What a compiler must know of; GCC 12 does.
PROBE = """
#include <stdlib.h>
typedef float two __attribute__((vector_size(8)));
two probe(two one, two other) { return __builtin_shufflevector(one, other, 0, 2); }
#if defined(__x86_64__)
#include <immintrin.h>
__attribute__((target("arch=x86-64-v4,avx512bf16,amx-bf16,amx-tile")))
void probe_tiles(void) { _tile_release(); }
#endif
"""
# A C compiler from PyPI, for machines without one. Before 0.17 it could not compile AVX-512.
ZIG = "ziglang>=0.17.1,<0.18"
# As scripts/* do, in an environment of their own; pip asks for whole wheels.
BY_NAME = "build_ext" in sys.argv


def found_compiler() -> list[str] | None:
    """$CC, or the first of this machine's compilers that is up to the kernels."""
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    names = (sysconfig.get_config_var("CC") or "cc", "cc", "gcc", "clang")
    commands = (shlex.split(name) for name in dict.fromkeys(names))
    return next(filter(compiles, commands), None)


def compiles(command: list[str]) -> bool:
    """Whether the command is there and compiles PROBE."""
    if not shutil.which(command[0]):
        return False
    probe = [*command, "-std=gnu11", "-fsyntax-only", "-x", "c", "-"]
    return subprocess.run(probe, input=PROBE, text=True, capture_output=True).returncode == 0


class BuildKernels(build_ext):
    """One call of the compiler, without the flags that Python itself was built with."""

    def get_ext_filename(self, fullname: str) -> str:
        """The same for every Python, for none is in it."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; raises CompileError, which setuptools only reports if optional."""
        library, cache = Path(self.get_ext_fullpath(ext.name)), os.path.abspath(self.build_temp)
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # should this fail, an old one must not be taken for it
        os.environ |= {"ZIG_LOCAL_CACHE_DIR": cache, "ZIG_GLOBAL_CACHE_DIR": cache}
        flags = [*FLAGS, *shlex.split(os.environ.get("CFLAGS", ""))]
        try:
            compiler = found_compiler() or self.zig()
            inputs = ["-shared", "-fPIC", *ext.sources, "-lm"]
            self.spawn([*compiler, *flags, *inputs, "-o", str(library)])
        except (CompileError, ExecError) as reason:
            lost = "CPU devices will compute with torch alone, which is slower"
            raise CompileError(f"no C kernels: {lost} ({reason})") from reason

    def zig(self) -> list[str]:
        """The compiler in ZIG, for any processor of this kind and glibc 2.28, as torch has it."""
        if BY_NAME and not find_spec("ziglang"):
            self.spawn([sys.executable, "-m", "pip", "install", "--quiet", ZIG])
            invalidate_caches()
        package = find_spec("ziglang")
        if package is None or package.origin is None:
            raise CompileError("there is no C compiler here")
        machine = platform.machine().replace("arm64", "aarch64")
        system = "macos" if sys.platform == "darwin" else "linux-gnu.2.28"
        program = Path(package.origin).with_name("zig")
        return [str(program), "cc", "-target", f"{machine}-{system}", "-s"]


class Wheel(bdist_wheel):
    """For every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Which Pythons and platforms may install the wheel."""
        return "py3", "none", super().get_tag()[2]


kernels = Extension(
    "spanwise.device._kernels",
    sources=sorted(glob(f"{KERNELS}/*.c")),
    depends=sorted(glob(f"{KERNELS}/*.h")),
    optional=not BY_NAME,
)
setup(
    ext_modules=[kernels],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    setup_requires=[] if BY_NAME or found_compiler() else [ZIG],
)
