"""An ASGI application on a port, inside a running event loop: uvicorn's protocol on httptools, with an end of ours."""

import asyncio
import ssl
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from kairos.adapters.http_server import listen


class AsgiServer:
    """One application on one port.

    Args:
        app: an ASGI 3 application; there are no lifespan events.
        port: 0 takes a free one.
        tls: for https.
    """

    def __init__(
        self,
        app: Any,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        keep_alive_s: int = 75,
    ) -> None:
        self.host, self.port = host, port
        self._tls = tls
        self._config = Config(
            app,
            http=HttpToolsProtocol,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            timeout_keep_alive=keep_alive_s,
        )
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """Where it listens, once it has started."""
        return f"{'https' if self._tls else 'http'}://{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self._state.connections)

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port cannot be had.
        """
        self._config.load()
        self._server, self.port = await listen(
            lambda: HttpToolsProtocol(self._config, self._state, {}), self.host, self.port, self._tls
        )

    def cut(self, client: tuple[str, int]) -> None:
        """End the connection of a client (`scope["client"]`) at once, without an answer."""
        for connection in list(self._state.connections):
            if getattr(connection, "client", None) == client:
                connection.transport.abort()

    async def stop(self, grace_s: float = 0.0) -> int:
        """Take no new connections, let requests end for so long, then cut what is left; how many were cut."""
        if self._server is None:
            return 0
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if grace_s and self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=grace_s)
        left = len(self._state.tasks)
        for connection in list(self._state.connections):
            connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=1.0)
        self._server = None
        return left
