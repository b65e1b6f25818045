"""Weights are read as detectron2 reads them; what can't be read is named in words."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from retina_focal.errors import UserError
from retina_focal.weights import load
from retina_focal.weights.load import Checkpointer
from retina_focal.weights.trained import expect_trained

WEIGHT = torch.arange(8.0).view(4, 2, 1, 1)


def conv() -> nn.Module:
    """Its parameter is called `stem.conv1.weight`."""
    model = nn.Module()
    model.stem = nn.Module()
    model.stem.conv1 = nn.Conv2d(2, 4, 1, bias=False)
    return model


def loaded(path: str) -> torch.Tensor:
    model = conv()
    Checkpointer(model).load(path)
    return model.stem.conv1.weight.detach()


def test_files_of_detectron2_and_name_matching_load(tmp_path):
    torch.save({"model": {"stem.conv1.weight": WEIGHT}}, tmp_path / "ours.pth")
    torch.save({"conv1.weight": WEIGHT}, tmp_path / "plain.pth")
    zoo = {"model": {"conv1.weight": WEIGHT.numpy()}, "__author__": "zoo"}
    zoo["matching_heuristics"] = True
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo))
    caffe2 = {"conv1_w": WEIGHT.numpy(), "conv1_w_momentum": np.zeros(1)}
    (tmp_path / "caffe2.pkl").write_bytes(pickle.dumps(caffe2))
    for name in ("ours.pth", "plain.pth?matching_heuristics=True", "zoo.pkl", "caffe2.pkl"):
        assert torch.equal(loaded(f"{tmp_path}/{name}"), WEIGHT), name
    with pytest.raises(UserError, match=r"matched by their ends: FILE[?]matching_heuristics=True"):
        loaded(f"{tmp_path}/plain.pth")


def test_nothing_is_loaded_from_nothing():
    assert Checkpointer(conv()).load("") == {}


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("part", [0, 100, None])
def test_a_file_that_is_not_whole_is_named(suffix, part, tmp_path):
    path = tmp_path / f"model.{suffix}"
    content = {"model": {"stem.conv1.weight": WEIGHT.numpy()}, "__author__": "zoo"}
    torch.save(content, path) if suffix == "pth" else path.write_bytes(pickle.dumps(content))
    path.write_bytes(b"<html>404</html>" if part is None else path.read_bytes()[:part])
    with pytest.raises(UserError, match=f"model.{suffix}' .*not a whole .*WEIGHTS FILE"):
        loaded(str(path))


def test_a_missing_file_is_named_beside_those_there_are(tmp_path):
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"model\.pth' do not exist .*beside it: other\.pth.*FILE"):
        loaded(f"{tmp_path}/model.pth?matching_heuristics=True")


@pytest.mark.parametrize(
    "url",
    ["http://example.org/model.pth", "ftp://example.org/m.pth", "https://x/../../.ssh/config"],
)
def test_a_url_that_is_no_https_or_leads_out_of_the_cache_is_not_fetched(url, monkeypatch):
    monkeypatch.setattr(load, "fetch", None)
    with pytest.raises(UserError, match=f"'{url}' are not fetched: expected .*https://"):
        loaded(url)


def test_an_option_of_a_path_is_obeyed_or_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"conv1.weight": WEIGHT}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(loaded(f"{path}?matching_heuristics=True&sha256={sha256}"), WEIGHT)
    with pytest.raises(UserError, match=rf"model\.pth' has the SHA-256 {sha256}, expected 0000"):
        loaded(f"{path}?sha256={'0' * 64}")
    with pytest.raises(UserError, match=r"model\.pth' has the option nope; expected"):
        loaded(f"{path}?nope=1")


def test_a_checkpointer_goes_on_after_a_file_that_is_not_whole(tmp_path):
    (tmp_path / "torn.pth").write_bytes(b"PK")
    torch.save({"model": {"stem.conv1.weight": WEIGHT}}, tmp_path / "model.pth")
    checkpointer = Checkpointer(conv())
    with pytest.raises(UserError, match="torn"):
        checkpointer.load(str(tmp_path / "torn.pth"))
    checkpointer.load(str(tmp_path / "model.pth"))
    assert torch.equal(checkpointer.model.stem.conv1.weight, WEIGHT)


def test_a_url_is_fetched_and_read(monkeypatch, tmp_path):
    torch.save({"conv1.weight": WEIGHT}, tmp_path / "model.pth")
    fetched = []
    monkeypatch.setattr(
        load, "fetch", lambda file, _: fetched.append(file) or f"{tmp_path}/model.pth"
    )
    url = "https://example.org/model.pth"
    assert torch.equal(loaded(f"{url}?matching_heuristics=True"), WEIGHT)
    assert fetched == [url]


def test_a_fault_while_loading_keeps_its_type(monkeypatch, tmp_path):
    torch.save({"model": {"stem.conv1.weight": WEIGHT}}, tmp_path / "model.pth")

    def broken(*args, **options):
        raise RuntimeError("ours")

    monkeypatch.setattr(nn.Module, "load_state_dict", broken)
    with pytest.raises(RuntimeError, match="ours"):
        loaded(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("kind", [torch.complex64, torch.int8, torch.bool])
def test_weights_that_are_no_floating_point_numbers_are_refused(kind, tmp_path):
    torch.save({"model": {"stem.conv1.weight": WEIGHT.to(kind)}}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=f"'stem.conv1.weight' as {kind}, expected floating"):
        loaded(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("name", ["stem.conv1.weight", "module.other.weight"])
def test_a_file_of_which_nothing_fits_is_refused(name, tmp_path):
    torch.save({"model": {name: WEIGHT[:1, :, :1]}}, tmp_path / "model.pth")
    words = rf"none of the weights fit.* '{name}', and the model 'stem.conv1.w"
    with pytest.raises(UserError, match=words):
        loaded(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_is_measured_with_weights_that_are_not_finite(value):
    model = conv()
    expect_trained(model, [], "x.pth")
    model.stem.conv1.weight.data[0] = value
    with pytest.raises(UserError, match=r"x.pth is not finite: 1 of .* \(stem.conv1.weight\)"):
        expect_trained(model, [], "x.pth")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="the system has no /proc/self/mem")
def test_a_file_that_can_not_be_read_is_named():
    with pytest.raises(UserError, match="can't read '/proc/self/mem'"):
        loaded("/proc/self/mem")
