"""Download a checkpoint to the model cache, once for all pods that share it.

    fetch_model.py REPOSITORY REVISION FOLDER

Takes safetensors, JSON and templates only: formats that run code when they are loaded stay on the hub. A
marker is written last, so a pod that starts later does not ask the hub, and needs no network, any more.
"""

import fcntl
import sys
import time
from pathlib import Path

MARKER = ".complete"
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def fetch(repository: str, revision: str, folder: Path) -> bool:
    """Fill `folder`, unless it is full; return whether anything was downloaded. Raises OSError."""
    marker = folder / MARKER
    wanted = f"{repository}@{revision}"
    if _is(marker, wanted):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        # Pods that start together: one downloads, the others wait for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is(marker, wanted):
            return False
        from huggingface_hub import snapshot_download

        snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=PATTERNS)
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise OSError(f"{wanted} has no config.json or no safetensors")
        marker.write_text(wanted)
    return True


def _is(marker: Path, wanted: str) -> bool:
    return marker.is_file() and marker.read_text() == wanted


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print(__doc__)
        return 2
    repository, revision, folder = arguments
    started = time.monotonic()
    try:
        downloaded = fetch(repository, revision, Path(folder))
    except OSError as error:
        print(f"can't fetch {repository}@{revision} to {folder}: {error}", file=sys.stderr)
        return 1
    took = f"downloaded in {time.monotonic() - started:.0f} s" if downloaded else "already there"
    print(f"{repository}@{revision}: {took}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
