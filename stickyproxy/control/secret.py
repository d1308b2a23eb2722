"""The secret that signs tokens where the file names none: made once, kept in the state directory."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path

from stickyproxy.errors import UsageError

logger = logging.getLogger(__name__)
_MIN_BYTES = 32


def state_directory(configured: Path | None) -> Path:
    """Return where state is kept: as configured, or as systemd or the XDG base directories say; raise UsageError."""
    if configured is not None:
        return configured
    if directory := os.environ.get("STATE_DIRECTORY"):  # systemd.exec(5), StateDirectory=
        return Path(directory.split(":", maxsplit=1)[0])
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not base.is_absolute():  # the specification asks to ignore a relative one
        try:
            base = Path.home() / ".local" / "state"
        except RuntimeError as error:  # a user without a name, as in some containers
            raise UsageError("this user has no home directory: set state_directory or affinity.secrets") from error
    return base / "stickyproxy"


def load_secret(configured: Path | None) -> tuple[bytes, ...]:
    """Return the secret that is kept, none where none was made yet; raise UsageError where it cannot be read."""
    path = state_directory(configured) / "secret"
    try:
        return (_load(path),)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise UsageError(f"cannot read the secret {path}: {(error.strerror or str(error)).lower()}") from error


def load_or_make_secret(directory: Path) -> bytes:
    """Return the secret kept in a directory, making it (mode 0600) where there is none; raise UsageError.

    Where the directory cannot be written the secret lasts as long as the process, and the log says so.
    """
    path = directory / "secret"
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(f"cannot read the secret {path}: {(error.strerror or str(error)).lower()}") from error
    secret = secrets.token_urlsafe(32).encode()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _keep(secret, path)
    except FileExistsError as error:  # another proxy made it just now
        try:
            return _load(path)
        except FileNotFoundError:
            raise UsageError(f"cannot make the secret {path}: a link that leads nowhere is in its place") from error
    except OSError as error:
        logger.warning(
            "cannot keep a secret in %s (%s): pins will not outlive this process; set affinity.secrets",
            directory,
            error.strerror,
        )
        return secret
    logger.info("made a secret in %s; for several replicas set the same affinity.secrets on each", path)
    return secret


def _keep(secret: bytes, path: Path) -> None:
    """Make the file whole or not at all; raise FileExistsError where there is one, OSError where it cannot be made."""
    draft = path.with_name(f".secret-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
        os.link(draft, path)  # a rename would replace the secret that another proxy uses already
    finally:
        with suppress(OSError):
            draft.unlink()


def _load(path: Path) -> bytes:
    secret = path.read_bytes().rstrip(b"\r\n")
    if len(secret) < _MIN_BYTES:
        raise UsageError(
            f"the secret {path} is too short ({len(secret)} bytes): remove the file to have a new one made"
        )
    return secret
