"""The listening socket, and server_config before it: what cannot work is refused.

Imports nothing heavy: a mistake is told before torch is read from disk.
"""

import signal
import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from executor.errors import UserError
from executor.recipe.schema import ServerSection

BACKLOG = 2048  # connections that wait to be accepted: as large as a benchmark's burst
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def interrupt(number: int, frame: Any) -> None:
    """While the model is loaded a signal ends the command as Ctrl-C does."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def listen(settings: ServerSection) -> socket.socket:
    """The listening socket. Raises UserError for settings that cannot work, or an address that cannot be had."""
    check_settings(settings)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)  # whoever connects from now on waits until the application runs
    except (OSError, TypeError, ValueError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"server_config: {settings.host!r}, port {settings.port} cannot be listened on ({reason}); choose another "
            "with --host and --port"
        ) from error
    return listener


def check_settings(settings: ServerSection) -> None:
    """Raises UserError for a certificate that cannot be used, or origins that no browser names so."""
    for origin in settings.allowed_origins:
        parts = urlsplit(origin)
        if origin != "*" and (not parts.netloc or f"{parts.scheme}://{parts.netloc}" != origin):
            raise UserError(
                f"server_config.allowed_origins holds {origin!r}; allowed: scheme, host and port as in "
                'https://host:8443, without a path or a slash at the end, or "*"'
            )
    if settings.ssl_keyfile and not settings.ssl_certfile:
        raise UserError("server_config.ssl_keyfile is set without ssl_certfile; set both, or neither for http")
    if settings.ssl_certfile:
        _check_certificate(settings.ssl_certfile, settings.ssl_keyfile)


def _check_certificate(certificate: str, key: str | None) -> None:
    for name, path in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        if path is not None and not Path(path).is_file():
            raise UserError(f"server_config.{name}: there is no file '{path}'; give a file in PEM form")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise UserError(
            f"server_config.ssl_certfile '{certificate}' with the key '{key or certificate}' cannot be used ({error}); "
            "give a certificate and its key in PEM form, the key without a password"
        ) from error
