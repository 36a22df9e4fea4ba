"""Builds and loads kernels.cpp for the machine it runs on.

The source is compiled once per machine, compiler and version of the source, on first use or by
`python -m disagg.model.native.library`, into a folder that belongs to the user alone. Where there is no C++
compiler, KernelsUnavailableError says so and the caller computes with torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
# Contraction to fused multiply-add is what the rates rest on, and clang would not do it across statements.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
BUILD_TIMEOUT_S = 300.0

Pointer = ctypes.c_void_p
Int = ctypes.c_int32

# What disagg_decoder_seconds counts, in its order.
PHASES = ("embed and head", "qkv", "rope and store", "attention", "output", "gate and up", "down", "waiting")


class KernelsUnavailableError(RuntimeError):
    """The kernels can't be built or loaded here; the message says why."""


class Weight(ctypes.Structure):
    """A packed matrix; see kernels.cpp for the layouts."""

    _fields_ = (
        ("data", Pointer),
        ("scale", Pointer),
        ("bias", Pointer),
        ("n", Int),
        ("k", Int),
        ("kind", Int),
    )


class Layer(ctypes.Structure):
    """Weights of one decoder layer."""

    _fields_ = (
        ("qkv", Weight),
        ("o", Weight),
        ("gate_up", Weight),
        ("down", Weight),
        ("input_norm", Pointer),
        ("mlp_norm", Pointer),
        ("q_norm", Pointer),
        ("k_norm", Pointer),
        ("window", Int),
    )


class Model(ctypes.Structure):
    """Shape and weights of the decoder."""

    _fields_ = (
        ("num_layers", Int),
        ("hidden", Int),
        ("num_heads", Int),
        ("num_kv_heads", Int),
        ("head_dim", Int),
        ("intermediate", Int),
        ("vocab", Int),
        ("eps", ctypes.c_float),
        ("layers", ctypes.POINTER(Layer)),
        ("norm", Pointer),
        ("embedding", Pointer),
        ("lm_head", Weight),
    )


class Cache(ctypes.Structure):
    """The paged KV cache."""

    _fields_ = (("blocks", Pointer), ("block_stride", ctypes.c_int64), ("block_size", Int))


class Step(ctypes.Structure):
    """One step's batch."""

    _fields_ = (
        ("num_tokens", Int),
        ("num_chunks", Int),
        ("num_samples", Int),
        ("token_ids", Pointer),
        ("positions", Pointer),
        ("cos", Pointer),
        ("sin", Pointer),
        ("chunk_of", Pointer),
        ("first_row", Pointer),
        ("table", Pointer),
        ("table_start", Pointer),
        ("sample_rows", Pointer),
        ("logits", Pointer),
    )


@functools.cache
def load_library() -> ctypes.CDLL:
    """Return the compiled kernels. Raises KernelsUnavailableError."""
    path = build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailableError(f"{path} can't be loaded: {error}") from None
    sizes = (ctypes.c_int64 * 5)()
    library.disagg_sizes(sizes)
    mine = [ctypes.sizeof(kind) for kind in (Weight, Layer, Model, Cache, Step)]
    if list(sizes) != mine:
        raise KernelsUnavailableError(f"{path} lays its structures out as {list(sizes)}, not {mine}")
    library.disagg_decoder_create.argtypes = (ctypes.POINTER(Model), Int)
    library.disagg_decoder_create.restype = Pointer
    library.disagg_decoder_forward.argtypes = (Pointer, ctypes.POINTER(Cache), ctypes.POINTER(Step))
    library.disagg_decoder_forward.restype = Int
    library.disagg_decoder_seconds.argtypes = (Pointer, ctypes.POINTER(ctypes.c_double))
    library.disagg_decoder_seconds.restype = None
    library.disagg_decoder_destroy.argtypes = (Pointer,)
    library.disagg_decoder_destroy.restype = None
    return library


def build() -> Path:
    """Return the compiled library, compiling it where that was not done before."""
    compiler = find_compiler()
    folder = cache_folder()
    target = folder / f"kernels-{_build_key(compiler)}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, or the first of COMPILERS on the path."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise KernelsUnavailableError(f"no C++ compiler found (looked for {', '.join(names)})")


def cache_folder() -> Path:
    """Return the folder of compiled libraries: $DISAGG_CACHE, or disagg in the user's cache folder.

    Code is loaded from it, so a folder that others may write to is refused.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DISAGG_CACHE") or Path(base) / "disagg")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise KernelsUnavailableError(f"{folder} can't be used: {error.strerror}") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise KernelsUnavailableError(f"{folder} must belong to this user and be writable by nobody else")
    return folder


def _build_key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (" ".join(FLAGS), compiler, platform.machine(), _cpu_features()):
        digest.update(part.encode() + b"\0")
    digest.update(version)
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    """Return what -march=native looks at: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model", "cpu family", "CPU part")
    return "\n".join(sorted({line for line in lines if line.partition(":")[0].strip() in wanted}))


def _compile(compiler: str, target: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    partial = Path(name)
    try:
        done = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", name],
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise KernelsUnavailableError(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
        # Workers that start together build it twice and use the same bytes.
        partial.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"{compiler} failed: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        print(f"CPU kernels: {build()}")
    except KernelsUnavailableError as unavailable:
        print(f"CPU kernels: {unavailable}; torch will compute instead")
