"""Names under which the cluster's actors are found, so that a restarted controller adopts what is there."""

from __future__ import annotations

NAMESPACE = "disagg"
CONTROLLER_NAME = "disagg-controller"
ROUTER_NAME = "disagg-router"


def worker_actor_name(worker_id: str) -> str:
    return f"disagg-worker-{worker_id}"


def worker_of_actor(name: str) -> str | None:
    """Return the worker's id of an actor's name, None where the actor is no worker."""
    prefix = worker_actor_name("")
    return name.removeprefix(prefix) if name.startswith(prefix) else None
