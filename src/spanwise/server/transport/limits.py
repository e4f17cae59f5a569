"""What a client may ask of the wire."""

from __future__ import annotations

import resource

import msgspec

from spanwise.errors import InputError

_KIB, _MIB = 2**10, 2**20

# Left for what is no connection: channels, logs, libraries, and those only told to go away.
_OTHER_DESCRIPTORS = 256
_MOST_CONNECTIONS = 4096


class TransportLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one HTTP process; sizes count bytes as they come over the wire.

    ``max_header_bytes`` is for one header, ``max_headers_bytes`` for those of a request together.
    Headers must be whole after ``headers_timeout_s``. A body must bring
    ``min_rate_bytes_per_s`` in every ``body_window_s`` and end within ``body_timeout_s``; the
    bodies that are still coming in hold at most ``max_unfinished_bodies_bytes`` together.

    A response whose client does not read waits once ``write_buffer_bytes`` lie unsent, and is
    dropped where a ``write_window_s`` passes below ``min_rate_bytes_per_s``.

    None for ``max_connections`` takes as many as the process may have descriptors for, and None
    for ``max_connections_per_client`` three quarters of that. On a full server a connection that
    has sat for ``evict_after_s`` without a request makes room for a new one.
    """

    max_url_bytes: int = 8 * _KIB
    max_num_headers: int = 100
    max_header_bytes: int = 32 * _KIB
    max_headers_bytes: int = 64 * _KIB
    headers_timeout_s: float = 10.0

    max_body_bytes: int = 32 * _MIB
    max_num_chunks: int = 2**16
    max_unfinished_bodies_bytes: int = 256 * _MIB
    body_window_s: float = 10.0
    body_timeout_s: float = 300.0

    min_rate_bytes_per_s: int = 1 * _KIB
    write_buffer_bytes: int = 64 * _KIB
    write_window_s: float = 30.0

    max_connections: int | None = None
    max_connections_per_client: int | None = None
    max_num_pipelined: int = 8
    keep_alive_timeout_s: float = 75.0
    evict_after_s: float = 1.0

    # One that is refused may read why for so long; this many at a time.
    linger_s: float = 1.0
    max_num_lingering: int = 128

    def __post_init__(self) -> None:
        """Raise InputError for a limit that is not positive."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} must be above 0, got {value}")
        if self.max_body_bytes > self.max_unfinished_bodies_bytes:
            raise InputError(
                f"max_body_bytes ({self.max_body_bytes}) must not be above "
                f"max_unfinished_bodies_bytes ({self.max_unfinished_bodies_bytes})"
            )

    def num_connections(self) -> int:
        """How many connections this process keeps open."""
        if self.max_connections is not None:
            return self.max_connections
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors == resource.RLIM_INFINITY:
            return _MOST_CONNECTIONS
        return min(max(descriptors - _OTHER_DESCRIPTORS, descriptors // 4, 1), _MOST_CONNECTIONS)

    def num_connections_per_client(self) -> int:
        """How many of them one address may have."""
        if self.max_connections_per_client is not None:
            return self.max_connections_per_client
        return max(self.num_connections() * 3 // 4, 1)
