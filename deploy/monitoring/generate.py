"""Write the dashboards and rules that the chart mounts, or with --check fail where they are not current.

python -m deploy.monitoring.generate [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.monitoring.overview import overview
from deploy.monitoring.rules import rule_file
from deploy.monitoring.workers import workers

CHART = Path(__file__).resolve().parents[2] / "helm" / "disagg"
_MADE_BY = "# Made by `python -m deploy.monitoring.generate`; edit deploy/monitoring/rules.py instead.\n"


def generated() -> dict[Path, str]:
    """Return every file's content by path."""
    files = {
        CHART / "dashboards" / f"{name}.json": _as_json(built)
        for name, built in (("overview", overview()), ("workers", workers()))
    }
    rules = yaml.safe_dump(rule_file(), sort_keys=False, width=110, allow_unicode=True)
    files[CHART / "rules" / "disagg.yaml"] = _MADE_BY + rules
    return files


def _as_json(built: object) -> str:
    value = built.build()  # type: ignore[attr-defined] # the SDK's builders share no base class
    text: str = json.dumps(value, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False)
    return text + "\n"


def stale() -> list[Path]:
    """Return the files whose committed content differs."""
    return [path for path, text in generated().items() if not path.exists() or path.read_text() != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if names := [str(path.relative_to(CHART)) for path in stale()]:
            sys.exit(f"not current, run `python -m deploy.monitoring.generate`: {', '.join(names)}")
        return
    for path, text in generated().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
