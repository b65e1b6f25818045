"""Each format of weights is read as the program that wrote it would read it, and runs nothing."""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLUGIN, STOCK, small_cfg
from detectron2.modeling import build_model

from retina_focal.errors import UserError
from retina_focal.weights.formats import check_sha256, read_weights, write_weights
from retina_focal.weights.load import load_weights
from retina_focal.weights.pickles import NUMPY, NotWeights, read_pickle

TENSORS = {
    "a": torch.randn(3, 4),
    "transposed": torch.randn(3, 4).t(),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "number": torch.tensor(3),
    "none": torch.zeros(0, 3),
}


def python2_pickle(arrays: dict[str, np.ndarray]) -> bytes:
    """What Python 2 and its numpy wrote for a dict of float32 arrays: every text is bytes."""

    def number(n: int) -> bytes:
        return b"J" + struct.pack("<i", n)

    def text(x: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(x)) + x

    def array(x: np.ndarray) -> bytes:
        new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        shape = b"(" + b"".join(map(number, x.shape)) + b"t"
        dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNN" + number(-1) * 2 + b"K\x00tb"
        return new + b"(K\x01" + shape + dtype + b"\x89" + text(x.tobytes()) + b"tb"

    items = b"".join(text(name.encode()) + array(x) for name, x in arrays.items())
    return b"\x80\x02}(" + items + b"u."


def numpy1_pickle(content: dict, protocol: int) -> bytes:
    """As numpy before 2 wrote it; of protocols whose texts have no lengths."""
    return pickle.dumps(content, protocol).replace(b"numpy._core.", b"numpy.core.")


def test_the_zoos_file_of_retinanet_loads_onto_the_plugin(tmp_path):
    stock, plugin = build_model(small_cfg(**STOCK)), build_model(small_cfg(**PLUGIN))
    weights = {name: x.numpy() for name, x in stock.state_dict().items()}
    # What the zoo's files hold beside today's names.
    extra = {"anchor_generator.cell_anchors.0": np.zeros((9, 4), np.float32)}
    zoo = {"model": weights | extra, "__author__": "Detectron2 Model Zoo"}
    for protocol in (2, 3):
        path = tmp_path / f"model_final_{protocol}.pkl"
        path.write_bytes(numpy1_pickle(zoo, protocol))
        assert b"numpy.core.multiarray" in path.read_bytes()
        load_weights(plugin, str(path))
        loaded = plugin.state_dict()
        assert all(torch.equal(x, stock.state_dict()[k]) for k, x in loaded.items() if k in weights)


def test_caffe2s_imagenet_weights_are_read_as_pickle_would_read_them(tmp_path):
    blobs = {
        "conv1_w": np.random.default_rng(0).normal(size=(4, 3, 7, 7)).astype(np.float32),
        "res_conv1_bn_s": np.arange(-2.0, 2.0, dtype=np.float32),
        "pred_b": np.zeros(0, np.float32),
    }
    path = tmp_path / "R-50.pkl"
    path.write_bytes(python2_pickle(blobs))
    expected = pickle.loads(path.read_bytes(), encoding="latin1")
    found = read_weights(path)
    assert found["__author__"] == "Caffe2" and found["matching_heuristics"] is True
    for name, x in blobs.items():
        assert np.array_equal(found["model"][name], x) and np.array_equal(expected[name], x)


def test_detectrons_file_is_read_without_momentum(tmp_path):
    blobs = {"w": np.ones(2), "w_momentum": np.ones(2), "lr": np.float32(0.01)}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(numpy1_pickle({"cfg": "MODEL: {}", "blobs": blobs}, 2))
    assert read_weights(path)["model"] == {"w": pytest.approx(1), "lr": np.float32(0.01)}


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_data_is_what_pickle_reads(protocol):
    content = {
        "arrays": [np.asfortranarray(np.ones((2, 3), np.float16)), np.zeros((2, 0)), np.arange(3)],
        "big endian": np.arange(4, dtype=">i4"),
        "ordered": collections.OrderedDict(a=np.array([True]), b=np.int64(3)),
        "plain": (
            None,
            True,
            1.5,
            "\u03b3",
            b"\xff",
            b"",
            1 << 80,
            -1,
            [1, (2, 3, 4, 5), {"x": ()}],
        ),
    }
    data = pickle.dumps(content, protocol)
    found, expected = read_pickle(io.BytesIO(data), len(data), NUMPY), pickle.loads(data)
    np.testing.assert_equal(found, expected)
    assert found["plain"] == content["plain"]
    for x in found["arrays"]:
        assert torch.from_numpy(x) is not None and x.flags.writeable


@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_checkpoint_of_torch_is_what_torch_reads(is_legacy, tmp_path):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state = collections.OrderedDict(TENSORS, parameter=torch.nn.Parameter(torch.ones(2)))
    state._metadata = {"": {"version": 1}}  # as of state_dict()
    content = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "milestones": collections.Counter([60000]),
        "iteration": 7,
        "classes": ["tree"],
        "shape": torch.Size([2]),
        "dtype": torch.float16,
    }
    if not is_legacy:
        content["model"]["eighth"] = torch.ones(2).to(torch.float8_e4m3fn)
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not is_legacy)
    found = read_weights(tmp_path / "x.pth")
    torch.testing.assert_close(found.pop("model"), content.pop("model"), rtol=0, atol=0)
    moments = found["optimizer"]["state"][0].pop("exp_avg")
    assert torch.equal(moments, optimizer.state_dict()["state"][0]["exp_avg"])
    assert {k: found[k] for k in content if k != "optimizer"} == {
        k: x for k, x in content.items() if k != "optimizer"
    }


def test_a_checkpoint_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": TENSORS}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_weights(tmp_path / "x.pth")["model"]["a"], TENSORS["a"])


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_a_tensor_is_noticed(bit, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"a": torch.full((99,), 5.0)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((99,), 5.0).numpy().tobytes()) + 200] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x.pth' is not a whole file of weights: .* is damaged"):
        read_weights(path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_written_is_read_and_no_suffix_is_asked(suffix, tmp_path):
    tied = {**TENSORS, "tied": TENSORS["a"]}
    checkpoint = {"model": tied, "classes": ["tree", "\u6a39"], "matching_heuristics": True}
    write_weights(tmp_path / f"x.{suffix}", checkpoint)
    (tmp_path / "link.pkl").symlink_to(tmp_path / f"x.{suffix}")
    found = read_weights(tmp_path / "link.pkl")
    torch.testing.assert_close(found.pop("model"), checkpoint.pop("model"), rtol=0, atol=0)
    assert found == checkpoint
    assert len(list(tmp_path.iterdir())) == 2


def test_tensors_can_be_left_in_the_file(tmp_path):
    torch.save({"model": TENSORS, "iteration": 7}, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth", mmap=True)
    assert found["iteration"] == 7 and torch.equal(found["model"]["a"], TENSORS["a"])
    assert str(tmp_path / "x.pth") in Path("/proc/self/maps").read_text()


def test_a_file_of_pycls_is_matched_by_names(tmp_path):
    state = {"conv.weight": torch.ones(1), "bn.num_batches_tracked": torch.tensor(1)}
    torch.save({"model_state": state, "epoch": 1}, tmp_path / "x.pyth")
    found = read_weights(tmp_path / "x.pyth")
    assert list(found["model"]) == ["conv.weight"] and found["matching_heuristics"] is True


def test_a_file_with_another_hash_than_was_given_is_refused(tmp_path):
    torch.save({"model": TENSORS}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth' has the SHA-256 [0-9a-f]{64}, expected 00"):
        check_sha256(str(tmp_path / "x.pth"), "00")


def test_a_pickle_that_copies_a_text_many_times_is_stopped():
    text = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
    encode = b"c_codecs\nencode\n" + text + b"q\x00X\x06\x00\x00\x00latin1q\x01\x86Rq\x02"
    again = b"c_codecs\nencode\nh\x00h\x01\x86R"
    data = b"\x80\x02(" + encode + again * 200 + b"t."
    with pytest.raises(NotWeights, match="more memory"):
        read_pickle(io.BytesIO(data), len(data), NUMPY)


def test_half_a_file_of_any_format_is_named(tmp_path):
    torch.save({"model": TENSORS}, tmp_path / "zip")
    torch.save({"model": TENSORS}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    write_weights(tmp_path / "x.safetensors", {"model": TENSORS})
    for path in list(tmp_path.iterdir()):
        content = path.read_bytes()
        for part in (1, 9, 40, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:part])
            with pytest.raises(UserError, match=rf"{path.name}' .*name another"):
                read_weights(path)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(UserError, match="zip' is a zip, but not one of torch"):
        read_weights(tmp_path / "zip")
