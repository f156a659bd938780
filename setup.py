"""Builds the compiled dropout kernel where there is a compiler; without one, numpy serves.

Everything else about the distribution stands in pyproject.toml.
"""

import sys

from setuptools import Extension, setup

# The library is loaded with ctypes and shares torch's OpenMP threads; other systems run one thread.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
UNIX_FLAGS = [] if sys.platform == "win32" else ["-O3", "-std=c++17", "-ffp-contract=off"]

setup(
    ext_modules=[
        Extension(
            "pipeline.dropout.kernels._masks",
            sources=["pipeline/dropout/kernels/masks.cpp"],
            language="c++",
            extra_compile_args=[*UNIX_FLAGS, *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
        )
    ]
)
