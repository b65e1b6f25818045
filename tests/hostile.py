"""Picture files from strangers, none of which may be decoded, waited for or run."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 30, 20
GREY = np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH)
COLOUR = np.stack([GREY % 251, GREY % 83, GREY % 31], axis=2).astype(np.uint8)  # RGB


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises a size, with nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def encoded(path: Path, image: Image.Image, name: str) -> bytes:
    other = path.with_name(name)
    image.save(other)
    return other.read_bytes()


def _files() -> dict[str, tuple[Callable[[Path], object], str]]:
    colour, grey = Image.fromarray(COLOUR), Image.fromarray(GREY * 90)
    real = Image.fromarray(GREY.astype(np.float32))

    def save(image: Image.Image, name: str, cut: slice = slice(None)) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(encoded(path, image, name)[cut])

    def spoil(path: Path) -> None:
        data = bytearray(encoded(path, colour, "b.png"))
        data[70] ^= 1  # of the compressed pixels
        path.write_bytes(data)

    turned = Image.Exif()
    turned[274] = 6  # a quarter turn

    return {
        "missing": (lambda path: None, "does not exist"),
        "folder": (lambda path: path.mkdir(), "is a folder"),
        "FIFO": (os.mkfifo, "is a FIFO"),
        "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        "broken link": (lambda path: path.symlink_to("nowhere"), "does not exist"),
        "circle of links": (lambda path: path.symlink_to(path.name), "can't be read"),
        "zero bytes": (lambda path: path.write_bytes(b""), "it is empty"),
        "text": (lambda path: path.write_text("no image"), "it is no whole picture"),
        "script": (lambda path: path.write_text("#!/bin/sh\necho"), "it is no whole picture"),
        "SVG": (lambda path: path.write_text("<svg width='9'/>"), "it is no whole picture"),
        "PostScript": (save(colour, "b.eps"), "PostScript, a program that would be run"),
        "half a JPEG": (save(colour, "b.jpg", slice(-200)), "it can't be decoded"),
        "half a PNG": (save(colour, "b.png", slice(-100)), "it is no whole picture"),
        "head of a JPEG": (save(colour, "b.jpg", slice(25)), "it is no whole picture"),
        "spoilt PNG": (spoil, "it is no whole picture: broken PNG"),
        "bomb beyond Pillow's limit": (lambda p: p.write_bytes(png_of(60_000, 60_000)), "MAX_PIX"),
        "bomb below Pillow's limit": (
            lambda path: path.write_bytes(png_of(12_000, 12_000)),
            "has 12000 x 12000 pixels, more than MODEL.RETINA_FOCAL.DATA.MAX_PIXELS",
        ),
        "PNG without pixels": (lambda p: p.write_bytes(png_of(WIDTH, HEIGHT)), "be decoded"),
        "16-bit grey PNG": (save(grey, "b.png"), "more than 8 bits .*white; scale them"),
        "16-bit grey TIFF": (save(grey, "b.tif"), "more than 8 bits"),
        "32-bit TIFF": (save(grey.convert("I"), "b.tif"), "more than 8 bits"),
        "floating-point TIFF": (save(real, "b.tif"), "more than 8 bits"),
        "another size": (save(colour.resize((9, 9)), "b.png"), "not 30 x 20 as annotated;"),
        "EXIF turn": (
            lambda path: colour.save(path, format="JPEG", exif=turned),
            "not 30 x 20 as annotated, once it is turned by its EXIF",
        ),
    }


# What makes the file at a path, and what the message says of it.
PICTURES = _files()
