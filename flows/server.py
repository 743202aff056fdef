"""The process of the embedded Prefect server: ``python -m flows.server SOCKET``; it ends when its standard input does.

That input is a pipe from the process that uses the server: however that process ends, no server stays behind. SOCKET is
the file descriptor of a socket that is bound to the server's address.
"""

import socket
import sys
import threading

import uvicorn
from prefect.server.api.server import create_app


def main(number: int) -> None:
    """Serve the API on that socket, without the page and the scheduling services."""
    config = uvicorn.Config(create_app(ephemeral=True, final=True), log_level="error")
    server = uvicorn.Server(config)

    def follow() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=follow, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=number)])


if __name__ == "__main__":
    main(int(sys.argv[1]))
