"""Ask URLs for their health: exit 0 if every one answers 200, else 1 and say why.

    probe.py [--key-file FILE] [--contains TEXT] URL...

Runs every few seconds in every pod, hence the standard library only, and no package of the image.
"""

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 4.0


def problem(url: str, key: str | None, contains: str) -> str | None:
    """Return what is wrong with the answer of `url`, or None."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Without proxies: the pod asks itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
            body: bytes = answer.read(65536)
    except urllib.error.HTTPError as error:
        detail = error.read(500).decode(errors="replace").strip()
        return f"{url}: {error.code} {detail}".strip()
    except (OSError, ValueError) as error:
        return f"{url}: {error}"
    if contains.encode() not in body:
        return f"{url}: {contains!r} is not in the answer"
    return None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--key-file", type=Path, help="file with the API key")
    parser.add_argument("--contains", default="", help="text that a good answer has in it")
    options = parser.parse_args(arguments)
    try:
        key = options.key_file.read_text().strip() if options.key_file else None
    except OSError as error:
        print(f"can't read the API key: {error}")
        return 1
    problems = [text for url in options.urls if (text := problem(url, key, options.contains))]
    print("\n".join(problems) or "ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
