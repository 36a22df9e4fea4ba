"""Write the table of values in helm/disagg/README.md from the comments of values.yaml.

    python helm/values_table.py [--check]

A comment that starts with "# --" describes the key below it; plain "#" lines right after it continue it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "disagg"
BEGIN = "<!-- values: begin (written by helm/values_table.py) -->"
END = "<!-- values: end -->"

_KEY = re.compile(r"^( *)([A-Za-z][A-Za-z0-9]*):")
_COMMENT = re.compile(r"^ *# ?(-- )?(.*)$")


@dataclass(frozen=True, slots=True)
class Row:
    """One value. path: with dots."""

    path: str
    default: str
    description: str


def rows(text: str) -> Iterator[Row]:
    """Yield a row per described key of a values file, in its order."""
    values = yaml.safe_load(text)
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if match := _COMMENT.match(line):
            if match[1]:
                comment = [match[2]]
            elif comment:
                comment.append(match[2])
            continue
        if match := _KEY.match(line):
            indent = len(match[1])
            path = [(depth, key) for depth, key in path if depth < indent] + [(indent, match[2])]
            if comment:
                keys = [key for _, key in path]
                yield Row(".".join(keys), _default(values, keys), " ".join(comment))
        comment = []


def _default(values: Any, keys: list[str]) -> str:
    for key in keys:
        values = values[key]
    return json.dumps(values)


def undescribed(text: str) -> list[str]:
    """Return the paths of values that no row covers, itself or by a row of a key above it."""
    described = {row.path for row in rows(text)}

    def walk(value: Any, path: str) -> Iterator[str]:
        if path in described:
            return
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{path}.{key}" if path else key)
        else:
            yield path

    return list(walk(yaml.safe_load(text), ""))


def table(text: str) -> str:
    """Return the Markdown table."""
    lines = ["| value | default | |", "|---|---|---|"]
    for row in rows(text):
        default, description = (cell.replace("|", "\\|") for cell in (row.default, row.description))
        lines.append(f"| `{row.path}` | `{default}` | {description} |")
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    """Return the README with its table replaced. Raises ValueError where it has no place for one."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError("README.md has lost the marks between which the table stands")
    return f"{head}{BEGIN}\n\n{table(text)}\n\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of values in the chart's README.")
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    options = parser.parse_args()
    path = CHART / "README.md"
    readme, text = path.read_text(), (CHART / "values.yaml").read_text()
    if missing := undescribed(text):
        print(f"without a description in values.yaml: {', '.join(missing)}")
        return 1
    new = with_table(readme, text)
    if options.check:
        print(
            "current" if new == readme else "helm/disagg/README.md is out of date: run helm/values_table.py"
        )
        return int(new != readme)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
