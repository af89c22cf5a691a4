"""Compiles the library that pwm_gym/kernels.py loads. Everything else about the package stands in setup.cfg.

It is plain C without Python's headers, so one wheel serves every Python. Where it can't be compiled, the installation
goes on without it and PyTorch does its work.
"""

import platform
import sys

from setuptools import Extension, setup

flags = [] if sys.platform == "win32" else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
if platform.machine() == "x86_64" and sys.platform == "linux":
    flags.append("-mprefer-vector-width=512")
openmp = ["-fopenmp"] if sys.platform == "linux" else []  # its runtime is the one that PyTorch has loaded
setup(
    ext_modules=[
        Extension(
            "pwm_gym._kernels",
            ["pwm_gym/_kernels.c", "pwm_gym/_products.c"],
            depends=["pwm_gym/_kernels.h", "pwm_gym/_tiles.h"],
            extra_compile_args=[*flags, *openmp],
            extra_link_args=openmp,
            py_limited_api=True,
            optional=True,
        )
    ]
)
