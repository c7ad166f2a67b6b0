"""Download files into the user's cache folder: once, with a checksum, never half a file."""

import hashlib
import http.client
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dnnlib.cli import UserError, expand_user
from dnnlib.files import atomic_write, sha256_of
from dnnlib.process_lock import ProcessLock
from dnnlib.progress import Progress

FOLDER_NAME = "lesion-stylegan2-ada"
_SILENT_SECONDS = 30  # give up on a server that sends nothing for this long
_CHUNK_BYTES = 1 << 20


class FetchError(UserError):
    """A file is not in the cache and cannot be downloaded."""


def cache_folder() -> Path:
    """Return $DNNLIB_CACHE_DIR, else $XDG_CACHE_HOME/lesion-stylegan2-ada, else ~/.cache/lesion-stylegan2-ada.

    The folder may not exist yet.
    """
    own, common = os.environ.get("DNNLIB_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(expand_user(own, "DNNLIB_CACHE_DIR"))
    return Path(expand_user(common or "~/.cache", "XDG_CACHE_HOME" if common else "the cache")) / FOLDER_NAME


def downloaded(name: str) -> Path:
    """Return where the file `name` is after it was downloaded, or copied there by hand."""
    return cache_folder() / "downloads" / name


def fetch(url: str, *, name: str, sha256: str | None) -> Path:
    """Return the path of a file, downloaded unless it is in the cache.

    name:    of the file in the cache
    sha256:  hexadecimal digits that the file's digest starts with, 64 or fewer; None when unknown: then only the
             length is checked

    Raises FetchError when it cannot be downloaded, UserError when a file in the cache has another checksum, and
    OSError when the cache is not writable.
    """
    path = downloaded(name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with ProcessLock.beside(path).awaited(f"waiting for {path.name}, which {{holder}} is downloading"):
            if not path.is_file():
                _download(url, path, sha256)
                return path
    digest = sha256_of(path)
    if sha256 is not None and not digest.startswith(sha256):
        raise UserError(f"{path} has the sha256 {digest}; expected {_wanted(sha256)}: remove it to download "
                        "it again")
    return path


def _download(url: str, path: Path, sha256: str | None) -> None:
    print(f"downloading {url} into {path.parent}", file=sys.stderr)
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for chunk in _chunks(url, path):
            file.write(chunk)
            digest.update(chunk)
        if sha256 is not None and not digest.hexdigest().startswith(sha256):
            raise _failure(url, path, f"the download has the sha256 {digest.hexdigest()}; expected {_wanted(sha256)}")


def _wanted(sha256: str) -> str:
    return sha256 if len(sha256) == 64 else f"one that starts with {sha256}"


def _chunks(url: str, path: Path) -> Iterator[bytes]:
    """Yield what a server sends; raise FetchError for any error on the way."""
    try:
        with urllib.request.urlopen(url, timeout=_SILENT_SECONDS) as response:
            length = int(response.headers.get("Content-Length", -1))
            received = 0
            with Progress(None if length < 0 else math.ceil(length / _CHUNK_BYTES), "MiB") as progress:
                while chunk := response.read(_CHUNK_BYTES):
                    received += len(chunk)
                    progress.advance()
                    yield chunk
    except urllib.error.HTTPError as error:
        raise _failure(url, path, f"the server answered {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _failure(url, path, f"{error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failure(url, path, f"{error}" or type(error).__name__) from None
    if received < length:
        raise _failure(url, path, f"the connection ended after {received} of {length} bytes")


def _failure(url: str, path: Path, reason: str) -> FetchError:
    # Raised without the system's error: trying again later would not help a machine without a network.
    return FetchError(f"{path.name} is not in the cache, and downloading {url} failed ({reason}): "
                      f"download it on a machine with network access, and copy it to {path}")
