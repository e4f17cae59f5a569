"""The socket of the store where NCCL ranks find one another.

Imports no torch, so that a supervisor can own the listener while another process serves it.
"""

from __future__ import annotations

import socket


def listen_on_loopback() -> socket.socket:
    """A listening TCP socket on a free port of 127.0.0.1.

    torch would listen on every interface by itself, with no key. Hand the socket to the process
    that calls ``nccl.serve_store``; the port is ``getsockname()[1]``.
    """
    return socket.create_server(("127.0.0.1", 0), backlog=128)
