"""Builds the compiled dropout kernel where there is a compiler; without one, numpy serves.

Everything else about the distribution stands in pyproject.toml.
"""

import sys

from setuptools import Extension, setup

# The library shares torch's OpenMP threads; where compilers come without OpenMP it runs one thread.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
# Products of dropped values are thrown away: g++ vectorises that only if they cannot trap.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-trapping-math", *OPENMP]

setup(
    ext_modules=[
        Extension(
            "pipeline.dropout.kernels._masks",
            sources=["pipeline/dropout/kernels/masks.cpp"],
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=OPENMP,
            optional=True,
        )
    ]
)
