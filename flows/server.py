"""The process of the embedded Prefect server: `python -m flows.server PORT`; it ends when its standard input does.

That input is a pipe from the process that the server is for: however that one ends, no server stays behind.
"""

import sys
import threading

import uvicorn
from prefect.server.api.server import create_app


def main(port: int) -> None:
    """Serve the API on that port of this machine alone, without the page and the scheduling services."""
    config = uvicorn.Config(create_app(ephemeral=True, final=True), "127.0.0.1", port, log_level="error")
    server = uvicorn.Server(config)

    def follow() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=follow, daemon=True).start()
    server.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
