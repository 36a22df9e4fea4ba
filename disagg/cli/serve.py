"""`disagg serve`: a whole cluster on this machine, or on the Ray that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from disagg.cluster.launch import check_port_free, free_port, start_ray
from disagg.config import ClusterConfig, expand_dotted, load_config, parse_config
from disagg.errors import ConfigError
from disagg.model.config import read_spec
from disagg.model.shard import check_size
from disagg.types import Role

console = Console(stderr=True)

ANSWER_TIMEOUT_S = 30.0
# The kernel may hand a signal to another thread, which does not wake the main one, and only that one runs its
# handler: it looks by itself so often.
SIGNAL_CHECK_S = 1.0
APPLICATION = "disagg"

_Model = Annotated[str | None, typer.Argument(help="Local folder with safetensors; none: the bundled model.")]
_Config = Annotated[Path | None, typer.Option("--config", help="YAML file; every flag has its key there.")]


def serve(
    model: _Model = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.")] = None,
    mixed: Annotated[int | None, typer.Option(help="Workers that do both (colocated).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name that clients use.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DISAGG_API_KEY", help="Require this key.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus output, tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences in one step.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens in one step.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens in one KV block.")] = None,
    kv_cache_memory: Annotated[float | None, typer.Option(help="Bytes, or a fraction of memory.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    quantization: Annotated[str | None, typer.Option(help="Round weights to int8 or int4 (CPU).")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", help="Ranks of each worker.")
    ] = None,
    prefill_tp: Annotated[int | None, typer.Option(help="The prefill pool's own -tp.")] = None,
    decode_tp: Annotated[int | None, typer.Option(help="The decode pool's own -tp.")] = None,
    kv_transport: Annotated[
        str | None, typer.Option(help="auto, shm, grpc, nccl (Gloo on CPUs) or nixl.")
    ] = None,
    config: _Config = None,
) -> None:
    """Start prefill and decode workers, the router and the front end; end them all on Ctrl-C."""
    flags = {
        "model.path": model,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "mixed.replicas": mixed,
        "frontend.host": host,
        "frontend.port": port,
        "frontend.grpc_port": grpc_port,
        "model.served_model_name": served_model_name,
        "frontend.api_key": api_key,
        "model.max_model_len": max_model_len,
        "engine.max_num_seqs": max_num_seqs,
        "engine.max_num_batched_tokens": max_num_batched_tokens,
        "engine.block_size": block_size,
        "engine.kv_cache_memory": kv_cache_memory,
        "engine.device": device,
        "model.dtype": dtype,
        "model.quantization": quantization,
        "prefill.tensor_parallel_size": prefill_tp if prefill_tp is not None else tensor_parallel_size,
        "decode.tensor_parallel_size": decode_tp if decode_tp is not None else tensor_parallel_size,
        "transfer.kv_transport": kv_transport,
    }
    try:
        settings = merge_flags(config, flags)
        check(settings)
        run(with_ports(settings))
    except ConfigError as error:
        console.print(f"[bold red]error:[/] {error.message}", highlight=False)
        raise typer.Exit(2) from None


def merge_flags(path: Path | None, flags: dict[str, Any]) -> ClusterConfig:
    """Return the file's settings with the given flags over them. Raises ConfigError."""
    data = expand_dotted(load_config(path)) if path is not None else {}
    for key, value in flags.items():
        if value is not None:
            *folders, leaf = key.split(".")
            target = data
            for folder in folders:
                target = target.setdefault(folder, {})
            target[leaf] = value
    return parse_config(data)


def check(config: ClusterConfig) -> None:
    """Raise ConfigError for what would only fail after the cluster is half up."""
    folder = config.model.folder
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model: no checkpoint in {folder} (a folder with config.json and safetensors is needed)",
            param="model",
        )
    spec = read_spec(folder)
    for role in Role:
        check_size(spec, config.pool(role).tensor_parallel_size)
    if config.engine.device == "cuda" and not os.environ.get("RAY_ADDRESS"):
        # Only here: it imports torch, which takes seconds.
        from disagg.model.device import resolve_device

        resolve_device("cuda")
    if config.mixed.replicas == 0 and (config.prefill.replicas == 0 or config.decode.replicas == 0):
        raise ConfigError("prefill and decode need at least one worker each", param="prefill")
    check_port_free(config.frontend.host, config.frontend.port, param="port")
    check_port_free(config.frontend.host, config.frontend.grpc_port, param="grpc_port")


def with_ports(config: ClusterConfig) -> ClusterConfig:
    """Return the configuration with a free port in place of each 0; a proxy can't be told to pick its own."""
    front = config.frontend
    chosen = {
        name: free_port(front.host)
        for name, port in (("port", front.port), ("grpc_port", front.grpc_port))
        if port == 0
    }
    return config.model_copy(update={"frontend": front.model_copy(update=chosen)})


def run(config: ClusterConfig) -> None:
    """Bring everything up, wait for a signal, take everything down."""
    started = time.monotonic()
    try:
        with _cluster(config):
            stop = threading.Event()
            _stop_on_signals(stop)
            console.print(f"ready in {time.monotonic() - started:.1f} s\n", style="bold green")
            _print_how_to_ask(config)
            while not stop.wait(SIGNAL_CHECK_S):
                pass
            console.print("stopping", style="dim")
    except KeyboardInterrupt:
        console.print("interrupted", style="dim")
        raise typer.Exit(130) from None


def _stop_on_signals(stop: threading.Event) -> None:
    """First SIGINT or SIGTERM: leave in order. Second: at once. Set up last, since ray.init sets its own."""

    def handle(signum: int, frame: object) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


@contextlib.contextmanager
def _cluster(config: ClusterConfig) -> Iterator[None]:
    """Ray, pools and the Serve application, in an order that loads models while Serve starts."""
    console.print("starting Ray", style="dim")
    own_ray = start_ray()
    import ray
    from ray import serve as ray_serve

    from disagg.cluster.controller import get_or_create_controller
    from disagg.frontend.app import build

    # Serve sets its logger up on import, and tells of each step of what we tell already.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    controller: Any = None
    try:
        controller = get_or_create_controller(config, secrets.token_hex(32))
        pools = controller.start.remote()
        console.print(f"loading {config.model.name}: {_pools(config)}", style="dim")
        # On a busy machine Serve replaces a proxy that was not ready in time, and says that the first died.
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray_serve.start(http_options={"host": config.frontend.host, "port": config.frontend.port})
        ray.get(pools)
        console.print("starting the front end", style="dim")
        application = build(config.model_dump(mode="json"))
        ray_serve.run(application, name=APPLICATION, route_prefix="/")
        _wait_until_answering(config)
        yield
    finally:
        with contextlib.suppress(Exception):
            if not own_ray:
                ray_serve.delete(APPLICATION)
            if controller is not None:
                ray.get(controller.shutdown.remote(), timeout=5)
                ray.kill(controller)
        # A Ray that was started here ends here, and Serve's own processes with it.
        ray.shutdown()


def _wait_until_answering(config: ClusterConfig) -> None:
    """Return when HTTP requests get through: the proxy in front takes a moment longer than the application.

    Raises ConfigError where they don't within ANSWER_TIMEOUT_S.
    """
    front = config.frontend
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        try:
            answer = httpx.get(f"http://{front.host}:{front.port}/health", timeout=5, trust_env=False)
            if answer.status_code < 500:
                return
            problem = "the proxy has no application"
        except httpx.HTTPError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise ConfigError(f"port: no answer on {front.host}:{front.port}: {problem}", param="port")
        time.sleep(0.1)


def _pools(config: ClusterConfig) -> str:
    counts = {role.value: config.pool(role).replicas for role in Role}
    return " + ".join(f"{count} {name}" for name, count in counts.items() if count)


def _print_how_to_ask(config: ClusterConfig) -> None:
    front = config.frontend
    url = f"http://{front.host}:{front.port}"
    key = ' -H "Authorization: Bearer $DISAGG_API_KEY"' if front.api_key else ""
    out = Console()
    out.print(f"HTTP     {url}/v1\ngRPC     {front.host}:{front.grpc_port}\nmetrics  {url}/metrics\n")
    out.print("Ask it something:\n", style="bold")
    out.print(
        f"  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        '    -d \'{"messages": [{"role": "user", "content": "Hello, what can you do?"}], "stream": true}\'\n',
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"  disagg chat --address {front.host}:{front.grpc_port}", highlight=False)
    out.print(f"  disagg status --url {url}\n", highlight=False)
    out.print("Ctrl-C stops everything.", style="dim")
