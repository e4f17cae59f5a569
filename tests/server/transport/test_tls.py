"""TLS: the same limits, and certificates that cannot be used."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import ssl
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import pytest
from tests.server.transport.wire import (
    CHUNKED,
    GET,
    KIB,
    MIB,
    QUICK,
    chunk,
    post,
    read_all,
    refused,
    serving,
    wait_for,
)

from spanwise.errors import InputError
from spanwise.server.transport.tls import tls_context

CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUAfZpUOH2F9qFjjOY22ePXeLG0NwwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTA0NTQyOFoYDzIxMjYxMDI4
MDQ1NDI4WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAT880TBGFugdBRHglV7EpmDC7HWn2sXRSF0zYn/2JGMqCR/5OI/dYQi
+wEeW7pKN2Ded9HBWoLEzsOFLsHGPECho28wbTAdBgNVHQ4EFgQU1epgHid2ksbp
qSpAdXssqvFsml8wHwYDVR0jBBgwFoAU1epgHid2ksbpqSpAdXssqvFsml8wDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgTp0oD7qNJE3Kq5BzEGJUfLhiocRhMomFNqOA8WW1jPICIGe3
60hy4Mn7saESH2A3qgkt9WYoKIt89iis52j2zWol
-----END CERTIFICATE-----
"""
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgaQUxxKNHpW8fc5wu
8Ydp6wnPs8WhBJ6N/WXRWh8SdGOhRANCAAT880TBGFugdBRHglV7EpmDC7HWn2sX
RSF0zYn/2JGMqCR/5OI/dYQi+wEeW7pKN2Ded9HBWoLEzsOFLsHGPECh
-----END PRIVATE KEY-----
"""
OTHER_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgHbtwMurmpOTovMx+
Go+d0VQLUgOHfu/xThpb0DlmZNOhRANCAAQyyO5sF1Yy5uGluae8NfVDtiVYm9VK
M3eupC751d66dXrL6xJ/UOGDE34jEwto2YtbCNGLCPyUDeBjwq0VIiEY
-----END PRIVATE KEY-----
"""
ENCRYPTED_KEY = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAighfesBVCCsAICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEJdKxrDWJLYh/ghaAT3IIQ4EgZBf
9EqDhXAOCU8r4vlwL6nNipzTpeRTVSesR7LdXIU1tXLYSHKtrben+jP3dp/SfKDk
mvojho28AZnSTrwXs6SSgBXZZ+Fq0SB8xt8NFvHwjkSlaCl/UfjHSQ7ZsZSHE8OG
Cmre1aSVG7MD3XbITpskpyPpfXcyUHXNI7i1hhUHMhh9VbsBTveh19ci0lSQr7c=
-----END ENCRYPTED PRIVATE KEY-----
"""


def test_tls_serves_refuses_and_ends_like_plain(tmp_path: Path) -> None:
    (tmp_path / "pem").write_text(CERTIFICATE + KEY)
    client = ssl.create_default_context(cadata=CERTIFICATE)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE  # the clock of a test machine may be anywhere
    limits = msgspec.structs.replace(QUICK, max_connections=20, evict_after_s=20.0)
    log, pem = tmp_path / "log", str(tmp_path / "pem")
    with serving(log, limits, certfile=pem) as server, ExitStack() as stack:

        def connect(receive_bytes: int = 0) -> socket.socket:
            raw = server.connect(receive_bytes=receive_bytes)
            return stack.enter_context(client.wrap_socket(raw, suppress_ragged_eofs=False))

        def ask(request: bytes) -> bytes:
            connection = connect()
            with suppress(ConnectionError, ssl.SSLError):
                connection.sendall(request)
            answer = b""
            with suppress(ConnectionError, ssl.SSLError):
                while data := connection.recv(64 * KIB):
                    answer += data
            return answer

        body = os.urandom(MIB)
        answer = ask(post(MIB, b"connection: close") + body)
        assert hashlib.sha256(body).hexdigest().encode() in answer
        num_fds = server.num_fds()
        refused(ask(GET + b"a: " + b"x" * 64 * KIB + b"\r\n\r\n"), 431)
        refused(ask(CHUNKED + chunk(b"x" * MIB) * 5), 413)
        refused(ask(GET), 408)
        # Neither a handshake that does not come to an end nor a deaf reader keeps its place.
        deaf = connect(receive_bytes=4 * KIB)
        deaf.sendall(b"GET /flood HTTP/1.1\r\n\r\n")
        silent = [stack.enter_context(server.connect()) for _ in range(19)]
        assert read_all(stack.enter_context(server.connect())) == b""
        assert [read_all(each) for each in silent] == [b""] * 19
        wait_for(lambda: server.num_fds() <= num_fds, "descriptors back to start")
        live = connect()
        live.sendall(b"GET /stream?n=20&every_ms=50 HTTP/1.1\r\n\r\n")
        assert live.recv(15) == b"HTTP/1.1 200 OK"
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ssl.SSLZeroReturnError):
            while b"[DONE]" not in live.recv(4 * KIB):
                pass
            while live.recv(4 * KIB):
                pass
            raise ssl.SSLZeroReturnError
        live.close()
        assert server.end() == 0


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        (CERTIFICATE, OTHER_KEY, "the key is not the certificate's"),
        (CERTIFICATE, ENCRYPTED_KEY, "encrypted"),
        (CERTIFICATE, "garbage", "cannot be used for TLS"),
        ("garbage", KEY, "cannot be used for TLS"),
        (CERTIFICATE, None, "cannot be used for TLS"),
        (None, KEY, "cannot read .*No such file"),
    ],
)
def test_files_that_are_no_pair_are_one_line(
    tmp_path: Path, certificate: str | None, key: str | None, message: str
) -> None:
    paths = [tmp_path / "cert.pem", tmp_path / "key.pem"]
    for path, text in zip(paths, (certificate, key), strict=True):
        if text is not None:
            path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        tls_context(str(paths[0]), str(paths[1]) if key is not None else None)
    assert "\n" not in str(caught.value)
