"""Builds what is in C: the router's core and copies of KV. All else is in pyproject.toml."""

from setuptools import Extension, setup

# Without contraction to fused multiply-add prices have the same bits as in Python. Optional: where there is
# no C compiler, the router does it all in Python, and numpy copies.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off"]

SOURCES = {
    "_blocks": ["_blocks.c", "_chains.c"],
    "_prices": ["_prices.c", "_board.c", "_accounts.c", "_fits.c"],
}
HEADERS = ["_accounts.h", "_board.h", "_chains.h", "_fits.h", "_map.h"]

setup(
    ext_modules=[
        Extension(
            f"disagg.routing.{name}",
            [f"disagg/routing/{source}" for source in sources],
            depends=[f"disagg/routing/{header}" for header in HEADERS],
            extra_compile_args=FLAGS,
            optional=True,
        )
        for name, sources in SOURCES.items()
    ]
    + [
        Extension(
            "disagg.transfer._copy", ["disagg/transfer/_copy.c"], extra_compile_args=FLAGS, optional=True
        )
    ]
)
