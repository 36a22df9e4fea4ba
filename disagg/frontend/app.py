"""The Ray Serve application: `serve run disagg.frontend.app:build`, `serve deploy deploy/serve.yaml`.

Each replica of the one deployment holds a whole front end (HTTP, gRPC, tokenizer, orchestrator). The first
to start creates the controller, which brings the pools up; the others find it.
"""

from __future__ import annotations

import secrets
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Receive, Scope, Send

from disagg.cluster.actors import router_address
from disagg.cluster.controller import get_or_create_controller
from disagg.config import ClusterConfig, expand_dotted, parse_config
from disagg.frontend.gateway import Gateway
from disagg.frontend.http import create_app

# A Serve application that is deleted leaves no call behind, only silence.
ORPHAN_TIMEOUT_S = 60.0
# By default Serve runs an application on a thread of its own and carries every message between two event
# loops, which fight for the interpreter lock. Nothing here blocks its loop, so one does for both.
REPLICA_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}


class _LateApp:
    """An ASGI app that connects to the cluster in its lifespan, on the loop that will serve it."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._gateway: Gateway | None = None
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._start()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._gateway is not None:
            await self._gateway.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        # The key of a file is read here and nowhere before, so that it never leaves the front end.
        front = self._config.frontend.with_key_read()
        controller: Any = get_or_create_controller(
            self._config, secrets.token_hex(32), orphan_timeout_s=ORPHAN_TIMEOUT_S
        )
        secret: Any = await controller.secret.remote()
        await controller.start.remote()
        self._controller_runs = controller.run.remote()
        self._gateway = Gateway(self._config.model_copy(update={"frontend": front}), secret, router_address)
        await self._gateway.start()
        self._app = create_app(self._gateway)


class Frontend:
    """The ingress deployment."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _LateApp(self._config)


def build(args: dict[str, Any] | None = None) -> Application:
    """Return the application. args: a ClusterConfig as nested mapping, or with dotted keys.

    Raises ConfigError naming the key that is wrong.
    """
    config = parse_config(expand_dotted(args or {}))
    deployment: Any = serve.deployment(
        serve.ingress()(Frontend),
        name="Frontend",
        num_replicas=config.frontend.replicas,
        # Streams are bounded by the workers' queues, not by Serve's.
        max_ongoing_requests=10_000,
        ray_actor_options={
            "num_cpus": 0,
            "resources": config.frontend.resources,
            "runtime_env": {"env_vars": REPLICA_ENVIRONMENT},
        },
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=10.0,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    application: Application = deployment.bind(config)
    return application
