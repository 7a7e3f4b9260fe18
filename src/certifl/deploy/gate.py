"""Flower's SuperLink behind a gate: from other machines, only clients' requests pass.

A SuperLink answers on one port: clients, but also anyone who starts runs or registers keys.
Behind this gate the latter is possible on the server's own machine only.

It is a process of its own, so nothing of certifl is imported that needs torch.
"""

from __future__ import annotations

import importlib
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_FOR_ALL = ("/v1/fleet/", "/health")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """Refuses requests from other machines that are not a client's.

    Args:
        app: the application behind the gate.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan" or allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            plain = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": plain})
            await send({"type": "http.response.body", "body": b"not from this machine"})


def allowed(scope: Scope) -> bool:
    """Whether a request may pass: a client's, or one from this machine."""
    path = str(scope.get("path", ""))
    if ".." not in path and path.startswith(_FOR_ALL):
        return True
    address = (scope.get("client") or ("",))[0]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def main() -> None:
    """Run a SuperLink with the arguments of `flower-superlink`."""
    import uvicorn
    from flwr.superlink.main import create_app

    # The package has a function with the module's name.
    flower = importlib.import_module("flwr.superlink.cli.flower_superlink")

    config = flower._parse_superlink_lifespan_config()
    app = Gate(create_app(config, flower.SuperLinkLifespan))
    uvicorn.run(
        app=app,
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # a client must not choose its own address
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        workers=1,
    )
