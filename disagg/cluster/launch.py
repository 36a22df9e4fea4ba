"""Start Ray on this machine for one cluster, and end it without leaving anything behind."""

from __future__ import annotations

import atexit
import logging
import os
import random
import shutil
import socket
import tempfile
from pathlib import Path

from disagg.errors import ConfigError

REPLICA_PORTS, PROXY_PORTS = 96, 4
# Small, since no KV travels through Ray's object store; Ray asks for at least 75 MiB.
OBJECT_STORE_BYTES = 80 * 1024 * 1024


def check_port_free(host: str, port: int, *, param: str) -> None:
    """Raise ConfigError naming `param` where host:port can't be bound; port 0 is always fine."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{param}: can't listen on {host}:{port}: {error.strerror}", param=param
            ) from None


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that was free a moment ago, for programs that can't be told to pick one themselves."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def free_range(length: int, host: str = "127.0.0.1") -> int:
    """Return the first of `length` ports below the ephemeral range that are all free now."""
    for start in random.sample(range(20_000, 30_000, length), 50):
        try:
            for port in range(start, start + length):
                check_port_free(host, port, param="port")
        except ConfigError:
            continue
        return start
    raise ConfigError("no free range of ports between 20000 and 30000", param="port")


def prepare_environment() -> None:
    """Set what Ray reads when it is imported or started; what the operator set already stays."""
    run_folder = Path(tempfile.mkdtemp(prefix="disagg-haproxy-"))
    # Before Ray is imported, so after whatever that ends when this process does.
    atexit.register(shutil.rmtree, run_folder, ignore_errors=True)
    # No port of the ephemeral range: until Serve binds it, a connection to anywhere could take it.
    replica_ports = free_range(REPLICA_PORTS + PROXY_PORTS)
    metrics_port, stats_port, fallback_port, fallback_grpc_port = range(
        replica_ports + REPLICA_PORTS, replica_ports + REPLICA_PORTS + PROXY_PORTS
    )
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Serve's Python proxy costs about 10 ms a request more than HAProxy.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # It would write a line for every request, which a process of Serve's reads and counts: a tenth of
        # what a request costs without the model. Front ends count theirs.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # Fixed paths and ports would make a second cluster on this machine fight the first.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        # Replicas share their ports with whoever else binds them: without a range of its own, this cluster's
        # proxy could send requests to another cluster's replica, past this one's API key.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_ports),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_ports + REPLICA_PORTS - 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run_folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run_folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run_folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run_folder / "server-state"),
        # With the default of 5 s a busy machine's proxy is replaced while it starts.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        # With the default of 0.1 s Serve's controller takes 3 % of a core to find that nothing has changed.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        # Nothing balances over a laptop's single replica, so there is nobody to wait for on the way out.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def start_ray(address: str | None = None) -> bool:
    """Connect to a running Ray (address, or RAY_ADDRESS), else start one that ends with this process.

    Returns whether it was started here, so that all of it may be ended here.
    """
    prepare_environment()
    import ray

    # What Ray and Serve tell of themselves while they start is noise here; their errors are not.
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)

    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        return False
    ray.init(
        # Said outright: without it Ray would join whatever cluster was last started on this machine.
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    return True
