"""Builds the optional C kernels; everything else stands in pyproject.toml.

The result is a plain shared library, not a Python module: it is found by its name and loaded through ctypes.
"""

from pathlib import Path

from setuptools import Extension, setup

SRC = Path("lightllm/native/src")
FLAGS = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi", "-pthread"]

setup(
    ext_modules=[
        Extension(
            "lightllm.native.kernels",
            sorted(path.as_posix() for path in SRC.glob("*.c")),
            depends=sorted(path.as_posix() for path in SRC.glob("*.h")),
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            # Without a compiler the package installs all the same, and says at start what is missing.
            optional=True,
        )
    ]
)
