"""detector.py: no torch, pictures as detectron2 reads them, and what it can't use is named."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from hostile import PICTURES, png_of
from PIL import Image

from retina_focal.export.beside import write_runtime

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make setup")
pytest.importorskip("onnx", reason="onnx is not installed: make setup")
from made_exports import METADATA, made_onnx, onnx_bytes
from real_exports import exported_network, photographs

from retina_focal.export.runtime import Detector

RUNTIME = Path(__file__).parent.parent / "retina_focal" / "export" / "runtime.py"
NOT_OURS = "its metadata was not written by retina-focal export"
POINTS = {
    "operating_points": {"red": 0.85, "blue": None},
    "calibration": {"red": {"method": "platt", "scores": [0.0, 1.0], "values": [0.0, 0.5]}},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """An export: a model without a network, and detector.py."""
    made_onnx(tmp_path)
    write_runtime(tmp_path)
    Image.new("RGB", (90, 60), "red").save(tmp_path / "picture.jpg")
    return tmp_path


def run(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, "detector.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, timeout=60)


def detector_of(folder: Path, found: tuple = (), flags: dict | None = None, **metadata) -> Detector:
    """A detector whose network finds `found` in every picture, and keeps its last input."""
    metadata = METADATA | metadata
    path = made_onnx(folder, metadata=metadata, dtype=metadata["input"]["dtype"])
    detector = Detector(path, **(flags or {}))
    seen = SimpleNamespace(input=None)
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)

    def runs(names: tuple, inputs: dict) -> list:
        assert names == ("boxes", "scores", "classes")
        seen.input = inputs["image"]
        return [x[None] for x in found or empty]

    detector.session = SimpleNamespace(run=runs)
    detector.seen = seen
    return detector


def test_it_is_short_and_imports_nothing_of_ours():
    text = RUNTIME.read_text()
    assert len(text.splitlines()) <= 120
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}


def test_it_runs_where_torch_can_not_be_imported(folder):
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.modules |= dict.fromkeys(['torch', 'torchvision', 'detectron2', 'cv2', 'onnx',"
        " 'retina_focal'])\n"
    )
    script = (
        "import sitecustomize, runpy, sys; sys.argv = ['detector.py', 'picture.jpg', '--json'];"
        "runpy.run_path('detector.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["picture", "boxes", "scores", "classes", "names"]
    assert found["names"] == ["red", "red", "blue"] and found["classes"] == [0, 0, 1]
    np.testing.assert_allclose(found["boxes"][0], [9, 12, 45, 36], atol=1e-4)
    np.testing.assert_allclose(found["scores"], [0.9, 0.8, 0.7], atol=1e-6)
    assert done.stderr == ""


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_the_model_reads_what_default_predictor_would_give_it(tmp_path, channels, dtype):
    generator = np.random.default_rng(0)
    detector = detector_of(
        tmp_path,
        input={"format": channels, "dtype": dtype},
        resize={"kind": "shortest_edge", "min": 80, "max": 133},
    )
    augmentation = T.ResizeShortestEdge([80, 80], 133)
    for number, (height, width) in enumerate([(60, 90), (90, 61), (300, 77), (50, 50), (7, 9)]):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        turned = Image.Exif()
        turned[274] = number + 4
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path, exif=turned)
        original = read_image(path, channels)
        expected = augmentation.get_transform(original).apply_image(original)
        detector(path)
        seen = detector.seen.input
        if dtype == "float32":
            expected = expected.astype(np.float32).transpose(2, 0, 1)
        assert seen.dtype == dtype and np.array_equal(seen[0], expected)
        detector(Image.open(path))
        assert np.array_equal(detector.seen.input, seen)
        detector(read_image(path, "RGB"))
        assert np.array_equal(detector.seen.input, seen)


def test_sizes_are_detectron2s(tmp_path):
    generator = np.random.default_rng(0)
    detector = detector_of(tmp_path)
    for height, width in [*generator.integers(1, 300, (200, 2)), (2666, 1333), (1333, 2667)]:
        least, most = (int(x) for x in generator.integers(20, 60, 2))
        detector.about |= {"min": least, "max": most}
        expected = T.ResizeShortestEdge.get_output_shape(height, width, least, most)
        if min(expected) > 0:
            detector(np.zeros((height, width, 3), np.uint8))
            assert detector.seen.input.shape[2:] == expected, (height, width, least, most)


def test_a_picture_stays_as_it_is_where_nothing_is_resized(tmp_path):
    detector = detector_of(tmp_path, resize={"kind": "none"})
    picture = np.arange(35 * 51 * 3).astype(np.uint8).reshape(51, 35, 3)
    detector(picture)
    assert np.array_equal(detector.seen.input[0], picture[:, :, ::-1].transpose(2, 0, 1))


def random_rows(count: int, width: int, height: int) -> tuple[np.ndarray, ...]:
    """Boxes that overlap, leave the picture and are empty, of 3 classes; the last tenth unused."""
    generator = np.random.default_rng(1)
    corner = generator.uniform(-20, 1, (count, 2)) * 1.0 + generator.uniform(0, [width, height])
    boxes = np.concatenate([corner, corner + generator.uniform(0, 40, (count, 2))], axis=1)
    boxes[::17, 2:] = boxes[::17, :2]
    scores = np.sort(generator.uniform(0.05, 1, count))[::-1]
    classes = generator.integers(0, 3, count)
    used = np.arange(count) < 0.9 * count
    return (
        (boxes * used[:, None]).astype(np.float32),
        (scores * used).astype(np.float32),
        np.where(used, classes, -1),
    )


def test_boxes_are_as_detectron2_postprocesses_them(tmp_path):
    boxes, scores, classes = random_rows(300, 180, 120)
    detector = detector_of(
        tmp_path, (boxes, scores, classes), classes=["a", "b", "c"],
        resize={"kind": "shortest_edge", "min": 120, "max": 200},
    )  # fmt: skip
    found = detector(np.zeros((77, 115, 3), np.uint8))
    height, width = detector.seen.input.shape[2:]
    kept = torch.from_numpy(classes >= 0).nonzero()[:, 0]
    instances = Instances(
        (height, width),
        pred_boxes=Boxes(torch.from_numpy(boxes)[kept]),
        scores=torch.from_numpy(scores)[kept],
        pred_classes=torch.from_numpy(classes)[kept],
    )
    expected = detector_postprocess(instances, 77, 115)
    assert 200 < len(expected) < 270
    np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor, atol=1e-4)
    assert np.array_equal(found.scores, expected.scores)
    assert np.array_equal(found.classes, expected.pred_classes)
    assert found.names == ["abc"[x] for x in expected.pred_classes]


def test_scores_are_raw_unless_a_flag_says_otherwise(tmp_path):
    boxes = np.float32([[0, 0, 9, 9]] * 4)
    rows = (boxes, np.float32([0.9, 0.85, 0.8, 0.5]), np.array([0, 0, 0, 1]))
    white = np.full((40, 40, 3), 255, np.uint8)

    def scores(**flags) -> list[float]:
        return detector_of(tmp_path, rows, flags, **POINTS)(white).scores.round(4).tolist()

    assert scores() == pytest.approx([0.9, 0.85, 0.8, 0.5])
    assert len(scores(threshold=0.5)) == 4  # of its least score, or more
    assert scores(threshold=0.6) == pytest.approx([0.9, 0.85, 0.8])
    assert scores(threshold=None) == pytest.approx([0.9, 0.85])
    assert scores(calibrated=True) == pytest.approx([0.45, 0.425, 0.4, 0.5])
    other = detector_of(tmp_path, rows, {"threshold": None})
    assert len(other(white).scores) == 4  # 0.3, where nothing was chosen
    for flags, change, message in [
        ({"calibrated": True}, {}, "no calibration: evaluate the run, then export it again"),
        ({"calibrated": True}, {"calibration": {"red": {}}}, NOT_OURS),
        ({"threshold": None}, {"operating_points": {"red": "x"}}, NOT_OURS),
        ({"calibrated": True}, POINTS | {"scores": "calibrated"}, "no calibration"),
        ({"threshold": float("nan")}, {}, "the threshold is nan, not from 0 to 1"),
        ({"threshold": 7}, {}, "the threshold is 7, not from 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=f"model.onnx' can't be used: .*{message}"):
            Detector(made_onnx(tmp_path, metadata=METADATA | change), **flags)


def test_a_bad_picture_is_named_and_the_others_are_done(folder):
    (folder / "broken.jpg").write_bytes((folder / "picture.jpg").read_bytes()[:300])
    done = run(folder, "broken.jpg", "picture.jpg", "gone.jpg", "--json")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("detector.py: 'broken.jpg' can't be used: ")
    assert second == "detector.py: 'gone.jpg' can't be used: there is no such file"
    assert run(folder, "picture.jpg").stdout.startswith("'picture.jpg': ([")
    (folder / "a\n\x1b[31m.jpg").write_bytes((folder / "picture.jpg").read_bytes())
    done = run(folder, "a\n\x1b[31m.jpg", "picture.jpg", "--threshold", "1")
    assert done.stdout == r"'a\n\x1b[31m.jpg': nothing found" + "\n'picture.jpg': nothing found\n"


def test_without_a_model_one_line_says_so(folder):
    (folder / "model.onnx").unlink()
    done = run(folder, "picture.jpg", "picture.jpg")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"detector.py: '.*model.onnx' can't be used: there is no such file\n",
                        done.stderr)  # fmt: skip
    assert run(folder).returncode == 2


def broken(**change) -> dict:
    return {k: v for k, v in {**METADATA, **change}.items() if v != "gone"}


MODELS = {
    "a folder": (lambda path: path.mkdir(), "it is a folder"),
    "a FIFO": (os.mkfifo, "there is no such file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "there is no such file"),
    "nothing in it": (lambda path: path.write_bytes(b""), "No graph was found"),
    "text": (lambda path: path.write_text("no model"), "protobuf parsing failed"),
    "truncated": (lambda path: path.write_bytes(onnx_bytes()[:-700]), "protobuf parsing failed"),
    "a newer ONNX": (lambda path: path.write_bytes(onnx_bytes(ir_version=99)), "IR version"),
    "a newer opset": (lambda path: path.write_bytes(onnx_bytes(opset=99)), "opset"),
    "no metadata": (lambda path: path.write_bytes(onnx_bytes(None)), NOT_OURS),
} | {
    name: (lambda path, x=metadata: path.write_bytes(onnx_bytes(x)), message)
    for name, metadata, message in [
        ("metadata that is no JSON", "{", NOT_OURS),
        ("metadata of a list", "[1, 2]", NOT_OURS),
        ("metadata of great depth", "[" * 100_000, NOT_OURS),
        ("a newer version", broken(version=99), "version is 99; use the detector.py beside it"),
        ("a version of text", broken(version="A" * 10**6), NOT_OURS),
        ("a true version", broken(version=True), "version is True; export it again"),
        ("no resize", broken(resize="gone"), NOT_OURS),
        ("resize of text", broken(resize="800"), NOT_OURS),
        ("another resize", broken(resize={"kind": "fixed"}), "kind is 'fixed'; export"),
        ("a size of text", broken(resize={**METADATA["resize"], "min": "9"}), "min is '9'"),
        ("a size below 0", broken(resize={**METADATA["resize"], "min": -5}), "min is -5"),
        ("no classes", broken(classes=None), "classes is None"),
        ("no class", broken(classes=[]), r"classes is \[\]"),
        ("numbers for classes", broken(classes=[3]), r"classes is \[3\]"),
        ("other channels", broken(input={"format": "HSV", "dtype": "uint8"}), "format is 'HSV'"),
        ("candidates", broken(nms="outside"), "nms is 'outside'"),
        ("another dtype", broken(input={"format": "RGB", "dtype": "uint8"}), "graph is"),
        ("a NaN", broken(operating_points={"red": float("nan")}), NOT_OURS),
    ]
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_that_is_no_such_model_is_named(attacked, name):
    path = attacked / "model.onnx"
    make, message = MODELS[name]
    make(path)
    with pytest.raises(ValueError, match=rf"'{path}' can't be used: .*{message}"):
        Detector(path)


def test_no_other_file_is_read(tmp_path, monkeypatch):
    path = made_onnx(tmp_path, outside="model.onnx")
    for folder in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(folder)
        for name in (path, os.path.relpath(path)):
            with pytest.raises(ValueError, match=r"used: .*its weights are in another file"):
                Detector(name)


def test_it_ends_quietly_where_nobody_reads_on(folder):
    command = f"{sys.executable} detector.py {'picture.jpg ' * 400} --json | head -1"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_a_fault_of_the_model_is_not_blamed_on_the_picture(folder):
    detector = Detector(made_onnx(folder, classes=[0, 7, 1, -1]))
    (folder / "model.onnx").unlink()  # nobody opens it again
    message = r"model.onnx' can't be used: its boxes or classes are of another model"
    with pytest.raises(ValueError, match=message):
        detector(folder / "picture.jpg")
    made_onnx(folder, classes=[0, 7, 1, -1])
    done = run(folder, "picture.jpg", "picture.jpg")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match=r"model.onnx' can't be used: graph is .*uint8"):
        Detector(made_onnx(folder, dtype="uint8"))


# What can be used here: nothing annotates a size, and detectron2 turns it too.
USED = {"another size", "EXIF turn", "bomb below Pillow's limit"}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", sorted(PICTURES.keys() - USED))
def test_no_picture_breaks_it(attacked, name):
    path = attacked / "a.jpg"
    PICTURES[name][0](path)
    reason = "it is EPS" if name == "PostScript" else r"\S"
    with pytest.raises(ValueError, match=f"'{path}' can't be used: {reason}"):
        detector_of(attacked)(path)


def test_a_bomb_and_a_thread_are_named(tmp_path):
    detector = detector_of(tmp_path)
    (tmp_path / "bomb.png").write_bytes(png_of(60_000, 60_000))
    with pytest.raises(ValueError, match="decompression bomb"):
        detector(tmp_path / "bomb.png")
    with pytest.raises(
        ValueError, match=r"it is too thin: \(1, 9000\) pixels are \[0, 1333\] to the"
    ):
        detector(np.zeros((9000, 1, 3), np.uint8))
    with pytest.raises(ValueError, match="it is None F; convert it"):
        detector(Image.new("F", (9, 9)))
    with pytest.raises(ValueError, match="the ndarray can't be used: its values are no uint8"):
        detector(np.zeros((9, 9, 3), np.float32))


@pytest.mark.slow
def test_a_fresh_environment_of_onnxruntime_and_pillow_suffices(folder):
    """It installs 200 MB. The import is measured in time of the processor: machines are shared."""
    place = folder / "venv"
    venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "onnxruntime", "pillow"]
    subprocess.run(pip, check=True)
    names = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert "torch" not in names and "opencv" not in names
    done = run(folder, "picture.jpg", "--json", python=python)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["names"] == ["red", "red", "blue"]
    script = (
        "from time import process_time as now; import onnxruntime; start = now(); import detector;"
        "print(now() - start)"
    )
    seconds = [
        float(subprocess.run([python, "-c", script], cwd=folder, capture_output=True).stdout)
        for _ in range(5)
    ]
    assert min(seconds) < 0.05
    shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.parametrize("uint8", [False, True])
def test_boxes_of_photographs_are_default_predictors(tmp_path, uint8):
    files = photographs(3)
    cfg = exported_network(tmp_path, uint8=uint8)
    predict, detector = DefaultPredictor(cfg), Detector(tmp_path / "model.onnx")
    for file in files:
        expected, found = predict(read_image(file, "BGR"))["instances"], detector(file)
        assert len(expected) > 20 and found.boxes.max() > cfg.INPUT.MAX_SIZE_TEST
        assert np.array_equal(found.classes, expected.pred_classes)
        np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor, atol=1e-3)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
