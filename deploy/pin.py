"""Write deploy/constraints.txt: the exact version of everything that an image installs.

    python deploy/pin.py

The versions are those of the environment that this runs in, which is the one that the tests ran in. Packages
that only a CUDA build of torch brings are pinned by torch itself.
"""

from __future__ import annotations

import re
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

OUT = Path(__file__).parent / "constraints.txt"
HEADER = "# Written by deploy/pin.py: what the images install, as it was tested.\n"


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str) -> dict[str, str]:
    """Return name and version of every installed package that `name` needs, without itself."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo: list[tuple[str, frozenset[str]]] = [(name, frozenset())]
    while todo:
        package, extras = todo.pop()
        if (package, extras) in seen:
            continue
        seen.add((package, extras))
        found = distribution(package)
        # "2.13.0+cpu": the part after + names a build, of which each variant of the image has its own.
        versions[package] = found.version.partition("+")[0]
        for text in found.requires or []:
            requirement = Requirement(text)
            if _applies(requirement, extras):
                todo.append((normalize(requirement.name), frozenset(requirement.extras)))
    del versions[name]
    return versions


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""})


def text(versions: dict[str, str]) -> str:
    return HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


if __name__ == "__main__":
    OUT.write_text(text(closure("disagg")))
