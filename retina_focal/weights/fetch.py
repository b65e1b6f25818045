"""Weights by https, kept where detectron2's own download looks for them."""

import os
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import HTTPRedirectHandler, Request, build_opener

from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils.file_io import Detectron2Handler
from iopath.common.file_io import file_lock, get_cache_dir
from tqdm import tqdm

from retina_focal.errors import UserError
from retina_focal.files import whole_file

ZOO = "dl.fbaipublicfiles.com"
SECONDS = 60  # that a server may say nothing
BLOCK = 2**20


def fetch(name: str, remedy: str) -> str:
    """The path of what a name of https://, detectron2:// or catalog:// means, fetched once.

    Args:
        remedy: what to do where it can't be fetched.
    Raises:
        UserError: it can't be fetched whole, or is redirected to another scheme than https.
    """
    try:
        url = address(name)
        path = _cached(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(path)):  # of several processes one fetches it
            if not path.is_file():
                _download(url, path)
    except (HTTPException, KeyError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"can't read '{name}' ({error}); {remedy}") from error
    return str(path)


def address(name: str) -> str:
    """The https URL of a name; detectron2 tells that of `detectron2://` and `catalog://`."""
    scheme, _, rest = name.partition("://")
    if scheme == "catalog":
        return ModelCatalog.get(rest)
    return Detectron2Handler.S3_DETECTRON2_PREFIX + rest if scheme == "detectron2" else name


def _cached(url: str) -> Path:
    parts = urlparse(url)
    # detectron2's cache leaves the host out of the path: a file of another host must not take the
    # place of the zoo's.
    host = "" if parts.hostname == ZOO else parts.hostname or ""
    folder = Path(get_cache_dir(), host, os.path.dirname(parts.path.lstrip("/")))
    return folder / url.split("/")[-1]


class _HttpsOnly(HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, new_url) -> Request | None:
        if urlparse(new_url).scheme != "https":
            raise URLError(f"it is redirected to {new_url}, and not to https")
        return super().redirect_request(request, file, code, message, headers, new_url)


def _download(url: str, path: Path) -> None:
    with (
        build_opener(_HttpsOnly).open(url, timeout=SECONDS) as response,
        whole_file(path) as temporary,
        temporary.open("wb") as file,
    ):
        for block in _blocks(response, path.name):
            file.write(block)


def _blocks(response: HTTPResponse, name: str) -> Iterator[bytes]:
    size = int(response.headers.get("Content-Length") or 0)
    with tqdm(total=size or None, unit="B", unit_scale=True, desc=name) as progress:
        try:
            while block := response.read(BLOCK):
                yield block
                progress.update(len(block))
        except OSError as error:  # without its number, which would be taken for the disk's
            raise URLError(error) from error
        if not progress.n or progress.n < size:
            raise URLError(f"it ended after {progress.n} of {size or '?'} bytes")
