"""Weights are fetched whole, by https alone, and each host's for itself."""

import errno
import io
import urllib.request
from email.message import Message
from urllib.response import addinfourl

import pytest
from detectron2.utils.file_io import PathManager

from retina_focal.errors import UserError
from retina_focal.weights.fetch import fetch

URL = "https://example.org/zoo/model.pth"


@pytest.fixture
def served(monkeypatch, tmp_path) -> dict[str, object]:
    """What servers answer, by URL: content, or where they redirect to; other URLs are not there."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    answers: dict[str, object] = {}

    def answer(handler, request) -> addinfourl:
        found, headers, code = answers[request.full_url], Message(), 200
        if isinstance(found, str):
            headers["Location"], found, code = found, b"", 302
        if isinstance(found, bytes):
            headers["Content-Length"], found = str(len(found)), io.BytesIO(found)
        elif code == 200:
            headers["Content-Length"] = "100"
        response = addinfourl(found, headers, request.full_url, code)
        response.msg = ""
        return response

    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", answer)
    monkeypatch.setattr(urllib.request.HTTPHandler, "http_open", answer)
    return answers


def test_a_file_is_fetched_once(served):
    served[URL] = b"weights"
    with open(fetch(URL, "")) as file:
        assert file.read() == "weights"
    served.clear()
    assert fetch(URL, "").endswith("/example.org/zoo/model.pth")


def test_detectron2_finds_what_was_fetched_for_its_names_and_of_other_hosts_nothing(served):
    served["https://dl.fbaipublicfiles.com/detectron2/a/model.pth"] = b"zoo"
    served["https://example.org/detectron2/a/model.pth"] = b"other"
    path = fetch("detectron2://a/model.pth", "")
    assert PathManager.get_local_path("detectron2://a/model.pth") == path
    assert fetch("https://example.org/detectron2/a/model.pth", "") != path
    with open(path) as file:
        assert file.read() == "zoo"


def test_a_redirection_is_followed_to_https_and_to_nothing_else(served):
    served |= {URL: "https://cdn.example.org/1", "https://cdn.example.org/1": b"weights"}
    assert fetch(URL, "")
    served |= {"https://x.org/a": "https://x.org/b", "https://x.org/b": "http://x.org/c"}
    served["http://x.org/c"] = b"attack"
    for target in ("http://x.org/c", "ftp://x.org/c", "file:///etc/passwd"):
        served["https://x.org/b"] = target
        with pytest.raises(UserError, match=rf"https://x.org/a' .*[Rr]edirect.*{target}"):
            fetch("https://x.org/a", "another file")


class Broken(io.BytesIO):
    def read(self, size: int = -1) -> bytes:
        raise OSError(errno.ECONNRESET, "Connection reset by peer")


@pytest.mark.parametrize(
    "content, message",
    [
        (io.BytesIO(b"half"), "ended after 4 of 100 bytes"),
        (b"", r"ended after 0 of \? bytes"),
        (Broken(), "Connection reset by peer"),
    ],
)
def test_what_is_not_whole_is_refused_and_not_kept(content, message, served, tmp_path):
    served[URL] = content
    with pytest.raises(UserError, match=f"can't read '{URL}' .*{message}.*; remedy"):
        fetch(URL, "remedy")
    assert not [x for x in tmp_path.rglob("*") if x.name == "model.pth" or "writing" in x.name]


@pytest.mark.parametrize("name", ["catalog://nope", "catalog://ImageNetPretrained/nope"])
def test_a_name_that_detectron2_has_not_is_said_in_words(name):
    with pytest.raises(UserError, match=f"can't read '{name}'"):
        fetch(name, "")
