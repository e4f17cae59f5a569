"""An HTTP process: ``-m`` this module. Sockets, tokenizing, detokenizing, streams.

It ends at SIGTERM, in an orderly way, and when its parent is gone.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys

import msgspec
import uvloop

from spanwise.engine.async_engine import AsyncEngine
from spanwise.server.app import create_app
from spanwise.server.config import HttpConfig
from spanwise.server.logs import write_logs
from spanwise.server.transport.server import HttpServer
from spanwise.server.transport.tls import tls_context
from spanwise.worker.lifeline import hang_on


async def serve(config: HttpConfig, listening: socket.socket, front: socket.socket) -> None:
    """Answer requests until told to end."""
    engine = AsyncEngine(front)
    tls = None if config.certfile is None else tls_context(config.certfile, config.keyfile)
    server = HttpServer(
        create_app(engine, config.options),
        listening,
        limits=config.limits,
        tls=tls,
        shutdown_timeout_s=config.shutdown_timeout_s,
        interrupt=lambda: engine.interrupt("the server is shutting down; send it again"),
        access_logger=logging.getLogger("spanwise.access") if config.access_log else None,
    )
    # A collection would look at a million objects that libraries made and nobody drops.
    gc.collect()
    gc.freeze()
    try:
        await server.serve()
    finally:
        await engine.close()


def main(listening_fd: int, front_fd: int, config_fd: int, lifeline_fd: int) -> None:
    """Run the process."""
    hang_on(lifeline_fd)
    encoded = os.pread(config_fd, os.fstat(config_fd).st_size, 0)
    config = msgspec.json.decode(encoded, type=HttpConfig)
    write_logs(config.log_format)
    listening, front = socket.socket(fileno=listening_fd), socket.socket(fileno=front_fd)
    listening.setblocking(False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, listening, front))
    sys.stderr.flush()
    os._exit(0)  # a thread may still be importing


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
