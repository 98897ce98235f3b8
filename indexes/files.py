"""Files that survive a kill: hashing, atomic replacement, and waiting for the disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import StoreError

HASH_BYTES = 16
_CHUNK = 1 << 20
TEMPORARY = ".tmp"  # the end of the name of a file that a kill may leave behind


def hash_file(path: str | os.PathLike[str]) -> str:
    """The BLAKE2b-128 of a file's bytes, as 32 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Gives a file new content at one instant.

    Whoever reads it, even after a power cut, finds the old content or the new.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Waits until a folder's entries are on the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Turns what goes wrong when writing to an index into one sentence.

    Raises:
        StoreError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(directory, error) from error


def cannot_write(directory: Path, error: Exception) -> StoreError:
    """The error for an index that cannot be written to."""
    reason = getattr(error, "strerror", None) or error
    return StoreError(f"Cannot write to the index in {directory}: {reason}.")
