"""The server's certificate."""

from __future__ import annotations

import ssl
from pathlib import Path

from spanwise.errors import InputError, reason


def tls_context(certfile: str, keyfile: str | None = None) -> ssl.SSLContext:
    """For TLS 1.2 and above; the key may stand in ``certfile`` too.

    Raises InputError for a file that cannot be used.
    """
    for path in filter(None, (certfile, keyfile)):
        _check_readable(path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except ssl.SSLError as error:
        files = f"{certfile} and {keyfile}" if keyfile else certfile
        why = _WHY.get(error.reason or "", f"they are no PEM files of one pair ({reason(error)})")
        raise InputError(f"{files} cannot be used for TLS: {why}") from error
    return context


_WHY = {
    "KEY_VALUES_MISMATCH": "the key is not the certificate's",
    "NO_START_LINE": "no certificate or no key was found in PEM form",
    "PEM_LIB": "no certificate with its key was found in PEM form",
}


def _check_readable(path: str) -> None:
    try:
        Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} for TLS: {error.strerror or error}") from error


def _no_password() -> str:
    # Without this the library would ask at the terminal, and wait.
    raise InputError("the key for TLS is encrypted; give one without a password")
