"""The page's door: open at once, and saying what is being loaded until the page itself is there.

Loading torch and gradio takes seconds. The address is bound before that, and a page of a few lines answers there; the
page itself then takes over the very socket, so that no visitor is ever turned away.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from textdiffusion.errors import UserError

PORTS = range(7860, 7960)  # tried in order where none is asked for
HERE = "127.0.0.1"
READY = "/textdiffusion-ready"  # what the waiting page asks, of whoever answers at the door
PATIENCE = 60.0  # seconds for the page to take over


class Door:
    """A bound address. Until `hand_over` a waiting page answers there.

    Args:
        server_name: address to listen at; None for this machine only. port: None for the first free one of PORTS.
    Raises:
        UserError: the port is taken, or the name is none of this machine's.
    """

    def __init__(self, server_name: str | None, port: int | None):
        host = server_name or HERE
        self.socket, self.port = _bound(host, PORTS if port is None else [port])
        name = "localhost" if host in ("0.0.0.0", "::") else host
        self.address = f"http://{f'[{name}]' if ':' in name else name}:{self.port}/"
        self.doing = "starting"
        self.handed_over = False
        door = self

        class Waiting(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                asked = self.path == READY
                kind = "application/json" if asked else "text/html; charset=utf-8"
                body = (json.dumps({"ready": False, "doing": door.doing}) if asked else waiting_page()).encode()
                self.send_response(200)
                for key, value in (
                    ("Content-Type", kind),
                    ("Content-Length", len(body)),
                    ("Cache-Control", "no-store"),
                ):
                    self.send_header(key, str(value))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *said: Any) -> None:
                pass

        self._waiting = ThreadingHTTPServer((host, self.port), Waiting, bind_and_activate=False)
        self._waiting.socket.close()
        self._waiting.socket = self.socket
        self._waiting.daemon_threads = True
        self._thread = threading.Thread(target=self._waiting.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self._server: Any = None

    def hand_over(self, app: Any) -> None:
        """Let an ASGI app answer from now on; who comes in between waits in the socket's queue.

        Raises:
            RuntimeError: it does not start.
        """
        import uvicorn

        async def ready(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["path"] != READY:
                await app(scope, receive, send)
                return
            body = json.dumps({"ready": True}).encode()
            headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        self._waiting.shutdown()
        config = uvicorn.Config(ready, log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self._thread.start()
        end = time.monotonic() + PATIENCE
        while not self._server.started:
            if time.monotonic() > end or not self._thread.is_alive():
                raise RuntimeError("the page's server does not start")
            time.sleep(0.005)
        self.handed_over = True

    def close(self) -> None:
        """Nobody answers any more."""
        if self._server is None:
            self._waiting.shutdown()
        else:
            self._server.should_exit = True
        self._thread.join(5)
        self.socket.close()


def _bound(host: str, ports: Any) -> tuple[socket.socket, int]:
    reason: OSError | None = None
    for port in ports:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, port), family=family, backlog=128), port
        except (OSError, UnicodeError) as error:
            reason = error if isinstance(error, OSError) else OSError(f"{host!r} is no address")
            if isinstance(error, socket.gaierror | UnicodeError):
                break
    place = f"{host}:{ports[0]}" if len(ports) == 1 else f"{host}:{ports[0]}-{ports[-1]}"
    raise UserError(
        f"the page cannot be served at {place} ({reason}); choose another --port or --server-name"
    ) from None


def waiting_page() -> str:
    """What answers at the door until the page is there. It asks again and again, and nothing of anybody else."""
    text = files(__package__).joinpath("waiting.html").read_text(encoding="utf-8")
    return text.replace("%READY%", READY)
