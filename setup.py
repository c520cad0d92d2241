"""The native core, built as one abi3 extension; everything else is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("src/tmem/backends/native")
# Our own builds and CI treat warnings as errors; a user's newer compiler must not break an install.
STRICT = ["-Wextra", "-Wconversion", "-Wsign-compare", "-Werror"] if os.environ.get("TMEM_STRICT") else []

setup(
    ext_modules=[
        Extension(
            "tmem.backends._native",
            sources=sorted(str(path) for path in NATIVE.glob("*.c")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            define_macros=[("Py_LIMITED_API", "0x030B0000"), ("_GNU_SOURCE", None)],
            extra_compile_args=["-std=c11", "-O2", "-g", "-Wall", *STRICT],
            libraries=["lz4", "zstd", "pthread"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
