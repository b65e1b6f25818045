"""Checkpoints are whole or absent; a run goes on from the newest that is whole and finite."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from retina_focal.errors import UserError
from retina_focal.tools.runs import weights_of
from retina_focal.training import checkpoint_files
from retina_focal.training.checkpoint_files import hash_file, write_checkpoint
from retina_focal.training.checkpoints import RunCheckpointer, expect_classes_of_run

FIRST, SECOND = "1" * 16, "2" * 16  # ids of runs


def model(value: float = 0.0, num_classes: int = 2) -> nn.Module:
    layer = nn.Linear(3, num_classes)
    nn.init.constant_(layer.weight, value)
    return layer


def save(folder: Path, *iterations: int, **options: object) -> RunCheckpointer:
    """Checkpoints whose weights are their iteration."""
    checkpointer = RunCheckpointer(model(), str(folder), **options)
    for iteration in iterations:
        nn.init.constant_(checkpointer.model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def resumed(folder: Path, **options: object) -> float:
    """The iteration that a run in the folder goes on from."""
    checkpointer = RunCheckpointer(model(-1.0), str(folder), **options)
    checkpointer.resume_or_load("")
    return checkpointer.model.weight[0, 0].item()


def test_a_checkpoint_has_its_hash_beside_it_and_is_read_by_detectron2(tmp_path):
    save(tmp_path, 4, classes=["a", "b"])
    path = tmp_path / "model_0000004.pth"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert hash_file(path).read_text() == f"{digest}  {path.name}\n"
    assert (tmp_path / "last_checkpoint").read_text() == path.name
    assert {x.name for x in tmp_path.iterdir()} == {
        path.name,
        hash_file(path).name,
        "last_checkpoint",
    }
    stock = DetectionCheckpointer(model(), str(tmp_path))
    assert stock.resume_or_load("")["iteration"] == 4
    assert (stock.model.weight == 4).all()


def spoil(path: Path, fault: str) -> None:
    content = bytearray(path.read_bytes())
    if fault == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault.startswith("flipped"):
        # The weights: the last of the pages that torch aligns to 64 bytes.
        content[content.index(torch.full((2, 3), 5.0).numpy().tobytes())] ^= 1
        path.write_bytes(content)
        if "without" in fault:
            hash_file(path).unlink()
    else:
        value = {"nan": float("nan"), "infinite": float("-inf")}[fault]
        write_checkpoint(path, {"model": model(value).state_dict(), "iteration": 5})


@pytest.mark.parametrize(
    "fault", ["torn", "empty", "flipped", "flipped without hash", "nan", "infinite"]
)
@pytest.mark.parametrize("tag", [True, False])
def test_a_spoilt_checkpoint_is_named_and_the_one_before_it_used(fault, tag, tmp_path, caplog):
    save(tmp_path, 3, 4, 5)
    spoil(tmp_path / "model_0000005.pth", fault)
    if not tag:
        (tmp_path / "last_checkpoint").unlink()
    assert resumed(tmp_path) == 4
    assert any("model_0000005.pth" in x.message and "skipped" in x.message for x in caplog.records)


def test_a_run_without_a_whole_checkpoint_does_not_start_from_zero(tmp_path):
    assert resumed(tmp_path) == -1  # there is none at all
    save(tmp_path, 3, 5)
    for path in tmp_path.glob("model_*.pth"):
        spoil(path, "torn")
    with pytest.raises(
        UserError, match=r"no checkpoint in .*model_0000005.pth.*leave out --resume"
    ):
        resumed(tmp_path)


def test_checkpoints_of_another_run_are_neither_deleted_nor_gone_on_with(tmp_path, caplog):
    first = save(tmp_path)
    for iteration in (1, 2, 9):
        first.save(f"model_{iteration:07d}", trainer=state_of(FIRST), iteration=iteration)
    (tmp_path / "run_id").write_text(f"{SECOND}\n")
    assert resumed(tmp_path) == -1  # begins anew
    assert "names model_0000009.pth, which is of an earlier run and is not" in caplog.text
    assert "3 checkpoints of an earlier run (model_0000009.pth, model_" in caplog.text
    second = save(tmp_path, keep=1)
    for iteration in (3, 4):
        nn.init.constant_(second.model.weight, iteration)
        second.save(f"model_{iteration:07d}", trainer=state_of(SECOND), iteration=iteration)
    assert [x.stem[-1] for x in sorted(tmp_path.glob("*.pth"))] == ["1", "2", "4", "9"]
    assert resumed(tmp_path) == 4
    assert weights_of(tmp_path).name == "model_0000004.pth"
    assert "than config.yaml" not in caplog.text
    (tmp_path / "model_0000004.pth").unlink()
    with pytest.raises(UserError, match=r"no checkpoint .*\(there: only last_checkpoint\)"):
        resumed(tmp_path)
    assert weights_of(tmp_path).name == "model_0000009.pth"
    assert "model_0000009.pth' is used, which is of an earlier run than config" in caplog.text


def test_a_checkpoint_of_another_run_is_kept_under_a_name_that_no_run_takes(tmp_path):
    for run in (FIRST, SECOND, SECOND):  # the second is resumed
        (tmp_path / "run_id").write_text(f"{run}\n")
        saver = save(tmp_path)
        nn.init.constant_(saver.model.weight, int(run[0]))
        saver.save("model_final", trainer=state_of(run), iteration=9)
        saver.save("model_final", trainer=state_of(run), iteration=9)
    kept = tmp_path / "earlier-1_model_final.pth"
    assert checkpoint_files.checkpoints_of(tmp_path) == [tmp_path / "model_final.pth"]
    assert {x.name for x in tmp_path.glob("earlier*")} == {kept.name, hash_file(kept).name}
    assert checkpoint_files.read_checkpoint(kept)["model"]["weight"].unique() == 1
    assert hash_file(kept).read_text().endswith(f"  {kept.name}\n")
    (tmp_path / "last_checkpoint").write_text(kept.name)
    (tmp_path / "run_id").unlink()
    assert saver._first_whole(checkpoint_files.checkpoints_of(tmp_path)) == str(kept)


@pytest.mark.parametrize("junk", [b"", bytes(16), b"junk", b"0123456789ABCDEF", b"a" * 3_000_000])
def test_a_run_id_that_is_none_counts_as_missing(junk, tmp_path, caplog):
    save(tmp_path).save("model_0000003", trainer=state_of(FIRST), iteration=3)
    (tmp_path / "run_id").write_bytes(junk)
    assert resumed(tmp_path) == resumed(tmp_path) == 0
    assert caplog.text.count("run_id' holds no id of a run, and counts as missing") == 1


def test_a_run_id_that_no_training_wrote_is_refused(tmp_path):
    checkpoint_files.expect_run_file(tmp_path)
    path = tmp_path / "run_id"
    path.write_text(f"{FIRST}\n")
    checkpoint_files.expect_run_file(tmp_path)
    path.rename(tmp_path / "other")
    for make, remove in (
        (path.mkdir, path.rmdir),
        (lambda: os.mkfifo(path), path.unlink),
        (lambda: path.symlink_to("other"), path.unlink),
        (lambda: path.symlink_to("nowhere"), path.unlink),
    ):
        make()
        with pytest.raises(UserError, match=r"run_id' is no regular file; .*: delete it"):
            checkpoint_files.expect_run_file(tmp_path)
        remove()


def state_of(run: str) -> dict:
    """Of a trainer."""
    hook = {"seed": 1, "processes": 1, "buffers": [], "evaluated": -1, "metrics_begin": 0}
    hooks = {"ExactResume": {**hook, "scalars": {}, "run": run}}
    return {"iteration": 1, "hooks": hooks, "optimizer": {"param_groups": [], "state": {}}}


def test_the_tagged_checkpoint_comes_first(tmp_path):
    save(tmp_path, 3, 4, 5)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth\n")
    assert resumed(tmp_path) == 3


@pytest.mark.parametrize("tag", ["./{}", "{folder}/{}", "../run/{}", "{}"])
def test_a_tag_may_hold_the_path_of_a_checkpoint_of_the_folder(tag, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    save(folder, 3, 5)
    (folder / "last_checkpoint").write_text(tag.format("model_0000003.pth", folder=folder))
    assert resumed(folder) == 3
    monkeypatch.chdir(tmp_path)
    assert resumed(Path("run")) == 3


@pytest.mark.parametrize(
    "tag", ["../evil.pth", "/etc/passwd", "evil.pkl", "model_\0.pth", "", "gone.pth", b"\xff\xfe"]
)
def test_a_tag_that_names_no_checkpoint_of_the_folder_is_not_followed(tag, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    save(folder, 3, 5)
    save(tmp_path, 9)
    (tmp_path / "model_0000009.pth").rename(tmp_path / "evil.pth")
    (folder / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/ran'\ntR.")
    (folder / "last_checkpoint").write_bytes(tag if isinstance(tag, bytes) else tag.encode())
    assert resumed(folder) == 5
    assert "last_checkpoint names" in caplog.text


def test_a_tag_that_is_no_file_is_not_waited_for(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "last_checkpoint").unlink()
    os.mkfifo(tmp_path / "last_checkpoint")
    os.mkfifo(tmp_path / "model_0000007.pth")
    assert resumed(tmp_path) == 3


@pytest.mark.parametrize("name", ["model_0000006", "model_final"])
def test_weights_that_are_not_finite_are_not_written(name, tmp_path):
    checkpointer = save(tmp_path, 5)
    checkpointer.model.bias.data[1] = float("inf")
    with pytest.raises(
        UserError, match=r"bias is not finite.*the last checkpoint is .*0000005.pth"
    ):
        checkpointer.save(name, iteration=6)
    assert not (tmp_path / f"{name}.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"


@pytest.mark.parametrize("call", ["replace", "fsync", "mkdir", "unlink", "open"])
@pytest.mark.parametrize("error", [errno.EROFS, None])
def test_whatever_a_save_dies_of_leaves_a_whole_checkpoint(call, error, tmp_path, monkeypatch):
    if call != "fsync":
        monkeypatch.setattr(os, "fsync", lambda fd: None)
    for skipped in range(20):
        folder = tmp_path / str(skipped)
        folder.mkdir()
        checkpointer = save(folder, 5)
        nn.init.constant_(checkpointer.model.weight, 6)
        original, left = getattr(os, call), [skipped]

        def fail(*args, original=original, left=left, **kwargs):
            left[0] -= 1
            if left[0] < 0:  # from here on, as when a disk is full
                raise OSError(error, "no") if error else KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            # One that replaces another of its name, as model_final.pth does.
            try:
                checkpointer.save("model_0000005", iteration=5)
            except UserError as told:
                assert "can't write" in str(told) and "the last checkpoint is" in str(told)
            except KeyboardInterrupt:
                assert error is None
        assert resumed(folder) in (5, 6)
        save(folder, 7)
        assert not list(folder.glob(".writing-*"))
        if left[0] >= 0:
            return
    raise AssertionError("not every call was tried")


def test_torchs_own_error_is_told_as_the_disks(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    checkpointer = save(tmp_path, 4)
    hashed = checkpoint_files._HashedFile
    monkeypatch.setattr(checkpoint_files, "_HashedFile", lambda file: hashed(Full(file)))
    with pytest.raises(UserError, match=r"can't write .*5.pth': No space left.*is .*0000004.pth"):
        checkpointer.save("model_0000005", iteration=5)
    assert resumed(tmp_path) == 4


def test_the_newest_checkpoints_stay_and_others_are_not_touched(tmp_path):
    (tmp_path / "model_mine.pth").touch()
    checkpointer = save(tmp_path, 9, 1, 2, 3, keep=2)  # 9 is of a run that was given up
    checkpointer.save("model_final", iteration=3)
    assert sorted(x.name for x in tmp_path.glob("*.pth")) == [
        *(f"model_{i:07d}.pth" for i in (2, 3, 9)),
        "model_final.pth",
        "model_mine.pth",
    ]
    assert len(list(tmp_path.glob("*.sha256"))) == 4


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"classes": ["a", "c"]}, 2, r"has the classes 2 \(a, b\), and the config 2 \(a, c\)"),
        (
            {},
            5,
            r"'bias' is \(2,\), and the config's \(5,\)\).*MODEL.WEIGHTS .*5.pth",
        ),
    ],
)
def test_another_model_is_refused_in_words(options, shape, message, tmp_path):
    save(tmp_path, 5, classes=["a", "b"])
    checkpointer = RunCheckpointer(model(num_classes=shape), str(tmp_path), **options)
    with pytest.raises(UserError, match=message):
        checkpointer.resume_or_load("")
    if options:
        with pytest.raises(UserError, match=message):
            expect_classes_of_run(str(tmp_path), options["classes"])
        expect_classes_of_run(str(tmp_path), ["a", "b"])
    more = RunCheckpointer(nn.Sequential(model()), str(tmp_path))
    words = r"another architecture: it has 2 \(bias, weight\) weights that .* lacks 2 \(0.bias, 0.w"
    with pytest.raises(UserError, match=words):
        more.resume_or_load("")


def test_a_negative_number_of_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="KEEP_CHECKPOINTS is -1; expected"):
        RunCheckpointer(nn.Linear(1, 1), str(tmp_path), keep=-1)
