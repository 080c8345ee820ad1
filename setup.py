"""Builds the kernels in C (g3n_mlx/kernels/src) into the package; where that fails, the package works without them.

They are a plain shared library, one for all Pythons of a platform. Every instruction set is a compilation of
instructions.c of its own, and the processor's is chosen when the library is loaded.
"""

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("g3n_mlx", "kernels", "src")
LIBRARY = Path("g3n_mlx", "kernels", "libg3n.dylib" if sys.platform == "darwin" else "libg3n.so")

# No errno and traps of floating point, which nothing here reads; products and sums may become one operation.
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-g0", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"]
ASKED = os.environ.get("CFLAGS", "").split()  # has the last word
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
INSTRUCTIONS = {
    "x86_64": {"plain": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"]},
    "aarch64": {"plain": [], "neon": []},
}


class BuildKernels(build_ext):
    """Compiles and links the library, as no extension module of Python's."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library goes, below the build folder or the checkout."""
        return str(LIBRARY) if fullname.startswith("g3n_mlx.") else LIBRARY.name

    def build_extension(self, ext: Extension) -> None:
        """Raises CompileError where there is no compiler that understands GCC's vectors, which is no failure."""
        if sys.platform == "win32":
            raise CompileError("the kernels need GCC or Clang, and POSIX threads")
        machine = sysconfig.get_platform().rpartition("-")[2]
        machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
        sets = INSTRUCTIONS.get(machine, {"plain": []})
        compiler, folder = self.compiler, Path(self.build_temp)

        def compiled(job: tuple[str, str, list[str]]) -> list[str]:
            source, name, flags = job
            return compiler.compile(
                [str(SOURCES / source)],
                str(folder / name),
                macros=[("INSTRUCTIONS", name)],
                extra_postargs=[*FLAGS, *flags, *ASKED],
            )

        jobs = [("instructions.c", name, flags) for name, flags in sets.items()]
        jobs += [("pool.c", "common", []), ("g3n.c", "common", [])]
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # the compiler is a process of its own
            objects = [found for job in threads.map(compiled, jobs) for found in job]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler.link_shared_object(objects, str(target), libraries=["m"], extra_postargs=["-pthread"])


class Wheel(bdist_wheel):
    """A wheel for every Python: of this platform with the kernels in it, of any without."""

    def run(self) -> None:
        """Builds the kernels first, since the name of the wheel depends on them."""
        self.run_command("build_ext")
        build = self.get_finalized_command("build_ext")
        self.root_is_pure = not Path(build.get_ext_fullpath("g3n_mlx.kernels.libg3n")).exists()
        if self.root_is_pure:
            self.distribution.ext_modules = []
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """No Python and no ABI."""
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "g3n_mlx.kernels.libg3n",
            sources=sorted(map(str, SOURCES.glob("*.c"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
