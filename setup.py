"""Builds the router's compiled core; everything else about the package is in pyproject.toml."""

from setuptools import Extension, setup

# Without contraction to fused multiply-add prices have the same bits as in Python. Optional: where there is
# no C compiler, the router does it all in Python.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off"]

setup(
    ext_modules=[
        Extension(
            f"disagg.routing.{name}",
            [f"disagg/routing/{name}.c"],
            extra_compile_args=FLAGS,
            optional=True,
        )
        for name in ("_blocks", "_prices")
    ]
)
