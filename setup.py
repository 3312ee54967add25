"""Build of moert: maps the top-level plug-in folders into the package and compiles csrc/.

Needs setuptools and a C++17 compiler, nothing else: the extension speaks raw pointers, so one build serves any torch.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# The limited API gives one wheel for 3.10 and up; free-threaded interpreters do not offer it.
LIMITED_API = platform.python_implementation() == "CPython" and not sysconfig.get_config_var("Py_GIL_DISABLED")

ROOT = Path(__file__).parent
PLUGIN_FOLDERS = ("kernels", "predictors")

# Of the compiler; each may take 350 MB.
MOST_PROCESSES = 8

packages = find_packages(include=["moert", "moert.*"])
package_dir = {}
for folder in PLUGIN_FOLDERS:
    packages.append(f"moert.{folder}")
    packages.extend(f"moert.{folder}.{name}" for name in find_packages(folder))
    package_dir[f"moert.{folder}"] = folder


class BuildExtension(build_ext):
    """Compiles several sources at a time."""

    def build_extensions(self) -> None:
        compile_in_turn = self.compiler.compile

        def compile_together(sources: list[str], **how: object) -> list[str]:
            with ThreadPoolExecutor(min(MOST_PROCESSES, os.cpu_count() or 1)) as pool:
                objects = pool.map(lambda source: compile_in_turn([source], **how), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_together
        super().build_extensions()


# No -march here: a wheel must run on any machine, so ISA-specific code is chosen at run time (target attributes).
extension = Extension(
    "moert._C",
    sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
    depends=sorted(str(path.relative_to(ROOT)) for kind in ("*.h", "*.inl") for path in (ROOT / "csrc").glob(kind)),
    define_macros=[("Py_LIMITED_API", "0x030A0000")] if LIMITED_API else [],
    py_limited_api=LIMITED_API,
    # No contraction: a product and a sum round separately in every build, so results do not depend on the compiler.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-pthread",
        "-Wall",
        "-Wextra",
        # Python's own flags ask for debugging information, which takes the compiler as long as all else.
        "-g0",
    ],
    extra_link_args=["-pthread"],
    language="c++",
)

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
