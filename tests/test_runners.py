"""Exported files run as the model they came from, and what is no such file is named."""

import json
from dataclasses import replace
from pathlib import Path
from time import process_time, sleep

import numpy as np
import onnx
import pytest
import torch
from made_exports import BOXES, CLASSES, METADATA, SCORES, made_onnx, onnx_bytes

from retina_focal.errors import UserError
from retina_focal.export.runners import exported_file, open_exported, open_session
from retina_focal.tools import evaluate, predict
from retina_focal.tools.runs import open_run


def with_input(dtype: str) -> dict:
    return {**METADATA, "input": {"format": "BGR", "dtype": dtype}}


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize(("number", "height", "width"), [(1, 40, 60), (3, 64, 32)])
def test_a_session_gives_boxes_in_pixels_of_the_images(tmp_path, dtype, number, height, width):
    path = made_onnx(tmp_path, metadata=with_input(dtype), dtype=dtype)
    shape = (number, height, width, 3) if dtype == "uint8" else (number, 3, height, width)
    boxes, scores, classes = open_session(path)(np.zeros(shape, dtype))
    expected = np.array(BOXES) * [width, height, width, height]
    np.testing.assert_allclose(boxes, [expected] * number, rtol=1e-6)
    np.testing.assert_allclose(scores, [SCORES] * number, rtol=1e-6)
    assert classes.tolist() == [[0, 0, 1, -1]] * number
    assert [x.dtype for x in (boxes, scores, classes)] == [np.float32, np.float32, np.int64]


def test_after_a_run_a_session_leaves_the_processor_to_others(tmp_path):
    """onnxruntime's threads would spin for 0.04 s; 0.01: two ticks of a coarse clock."""
    session = open_session(made_onnx(tmp_path, network=True), threads=2)
    session(np.zeros((4, 3, 400, 400), np.float32))
    used = process_time()
    sleep(0.1)
    assert process_time() - used < 0.01


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_detections_are_in_pixels_of_the_picture_without_unused_rows(tmp_path, dtype):
    model = open_exported(made_onnx(tmp_path, metadata=with_input(dtype), dtype=dtype).parent)
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    other = torch.zeros(3, 48, 32, dtype=torch.uint8)
    batch = [{"image": image, "height": 320, "width": 640}, {"image": image}, {"image": other}]
    found = [x["instances"] for x in model(batch)]
    for instances, (height, width) in zip(found, [(320, 640), (32, 64), (48, 32)], strict=True):
        assert instances.image_size == (height, width)
        expected = torch.tensor(BOXES[:3]) * torch.tensor([width, height, width, height])
        torch.testing.assert_close(instances.pred_boxes.tensor, expected)
        assert instances.pred_classes.tolist() == [0, 0, 1]
        torch.testing.assert_close(instances.scores, torch.tensor(SCORES[:3]))


@pytest.mark.parametrize(
    ("changes", "classes", "kept"),
    [
        ({}, CLASSES, [0.9, 0.7]),
        ({"nms_thresh": 0.99}, CLASSES, [0.9, 0.8, 0.7]),
        ({"nms_thresh": 0.99}, [0, -1, 1, -1], [0.9, 0.7]),
        ({"detections_per_image": 1}, CLASSES, [0.9]),
    ],
)
def test_candidates_are_suppressed_here(tmp_path, changes, classes, kept):
    made_onnx(tmp_path, metadata={**METADATA, "nms": "outside", **changes}, classes=classes)
    (found,) = open_exported(tmp_path)([{"image": torch.zeros(3, 100, 100)}])
    torch.testing.assert_close(found["instances"].scores, torch.tensor(kept))


def test_a_run_and_a_file_of_results_are_no_exported_model(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert exported_file(tmp_path) is None
    assert exported_file(tmp_path / "results.json") is None
    with pytest.raises(UserError, match="is no exported model; expected a file"):
        open_session(tmp_path)
    made_onnx(tmp_path)
    (tmp_path / "model.pt2").touch()
    with pytest.raises(UserError, match=r"holds several exported models, model\.onnx, model\.pt2"):
        exported_file(tmp_path)


def of(**changes) -> bytes:
    return onnx_bytes(metadata={**METADATA, **changes})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: b"hello world", "is no ONNX model"),
        (lambda: b"", "is no ONNX model"),
        (lambda: onnx_bytes()[:-60], "is cut off or damaged"),
        (lambda: onnx_bytes(ir_version=99), "is of a newer version of ONNX .*99"),
        (lambda: onnx_bytes(opset=99), "is of a newer version of ONNX .*99"),
        (lambda: onnx_bytes(metadata=None), "has no metadata 'retina_focal'"),
        (lambda: onnx_bytes(metadata="{"), "metadata"),
        (lambda: onnx_bytes(metadata="[]"), "metadata"),
        (lambda: onnx_bytes(class_dtype=np.float32), "classes is .*tensor.float., expected int64"),
        (lambda: of(version=2), "version"),
        (lambda: of(nms_thresh="high"), "wrong metadata .nms_thresh is 'high'"),
        (lambda: of(resize=800), "wrong metadata .resize is 800"),
        (lambda: of(classes=None), "wrong metadata"),
        (lambda: of(classes=[]), "wrong metadata .it names 0 classes"),
        (lambda: of(resize={"kind": "shortest_edge", "min": -5, "max": 9}), "resize is .*-5"),
        (lambda: of(detections_per_image=0), "and 0 detections"),
        (lambda: of(version=True), "metadata of version True"),
        (lambda: of(version="A" * 10**6), r"version 'A{39};"),
        (lambda: of(nms_thresh=float("nan")), "wrong metadata .*NaN"),
        (lambda: of(precision="int4"), "wrong metadata .precision is 'int4'"),
        (
            lambda: of(input={"format": "BGR", "dtype": "uint8"}),
            "image is .*float.*, expected uint8",
        ),
        (lambda: onnx_bytes(classes=[0, 0, 2, -1]), "a class 2 but its metadata names 2 classes"),
    ],
)
def test_a_file_that_is_no_export_of_ours_is_refused_in_words(tmp_path, content, words):
    path = tmp_path / "model.onnx"
    path.write_bytes(content())
    with pytest.raises(UserError, match=words) as refused:
        open_exported(path)([{"image": torch.zeros(3, 32, 32)}])
    assert str(path) in str(refused.value) and "retina-focal export" in str(refused.value)


def test_weights_in_another_file_are_not_read(tmp_path, monkeypatch):
    path = made_onnx(tmp_path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w", size_threshold=0)
    assert (tmp_path / "w").stat().st_size
    for folder in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(folder)
        with pytest.raises(UserError, match="keeps weights in another file"):
            open_exported(path)


def test_arrays_that_hold_no_boxes_are_named(tmp_path):
    model = open_exported(made_onnx(tmp_path))
    arrays = np.zeros((1, 1, 5)), np.ones((1, 1)), np.zeros((1, 1), int)
    model.session = replace(model.session, run=lambda images: arrays)
    with pytest.raises(UserError, match=r"gives arrays of \[\(1, 1, 5\), \(1, 1\), \(1, 1\)\]"):
        model([{"image": torch.zeros(3, 32, 32)}])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.onnx' does not exist"):
        open_session(tmp_path / "model.onnx")


@pytest.mark.parametrize(("threads", "expected"), [(None, 3), (5, 5)])
def test_threads_are_torchs_unless_told(tmp_path, monkeypatch, threads, expected):
    import onnxruntime

    seen = []
    session = onnxruntime.InferenceSession

    def noted(path, options, *rest):
        seen.append(options.intra_op_num_threads)
        return session(path, options, *rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    open_session(made_onnx(tmp_path), threads)
    assert seen == [expected]


def test_metadata_survives_json(tmp_path):
    metadata = open_session(made_onnx(tmp_path)).metadata
    assert json.loads(metadata.to_json()) == METADATA


def evaluated(capsys, *argv: str) -> dict:
    evaluate.main(["--json", "--draws", "3", *argv])
    return json.loads(capsys.readouterr().out)[0]


def test_an_exported_file_is_evaluated_as_its_detections_are(tmp_path, data, capsys, own_cache):
    """The same detections as a file of results, in pixels of pictures of 64 x 96."""
    boxes = np.array(BOXES[:3]) * [96, 64, 96, 64]
    results = [
        {
            "image_id": image,
            "category_id": [1, 1, 2][i],
            "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            "score": SCORES[i],
        }
        for image in range(6)
        for i, box in enumerate(boxes)
    ]
    (tmp_path / "found.json").write_text(json.dumps(results))
    content = json.loads((data / "a.json").read_text())
    for annotation in content["annotations"][::3]:  # some of them found
        own = next(x for x in results if x["category_id"] == annotation["category_id"])
        annotation["bbox"] = own["bbox"]
    truth = str(data / "found.json")
    Path(truth).write_text(json.dumps(content))
    expected = evaluated(capsys, str(tmp_path / "found.json"), "--data", truth)
    path = made_onnx(tmp_path)
    for name in (path, path.parent):
        found = evaluated(capsys, str(name), "--data", truth)
        assert found["detections"] == expected["detections"] == 18
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-3)  # fp32 boxes
        assert found["label"] == str(path)
    assert 5 < expected["metrics"]["AP50"] < 95


def test_of_an_exported_file_only_what_it_does_not_fix_can_be_set(tmp_path, data, capsys):
    argv = [str(made_onnx(tmp_path)), "--data", str(data / "a.json"), "--opts"]
    evaluate.main(["--draws", "3", *argv, "INPUT.MIN_SIZE_TEST", "64"])
    for key, value in (("MODEL.RETINANET.SCORE_THRESH_TEST", "0.5"), ("TEST.AUG.ENABLED", "True")):
        with pytest.raises(SystemExit, match=f"{key} is fixed in an exported file"):
            evaluate.main([*argv, key, value])
    with pytest.raises(SystemExit, match="add: --data DATA"):
        evaluate.main(argv[:1])


def test_points_of_the_metadata_count_in_an_evaluation(tmp_path, data, capsys):
    points = {"red": 0.85, "blue": None}
    calibration = {
        name: {"method": "platt", "scores": [0.1, 0.9], "values": [0.2, 0.7]} for name in points
    }
    made_onnx(
        tmp_path, metadata={**METADATA, "operating_points": points, "calibration": calibration}
    )
    argv = [str(tmp_path), "--data", str(data / "a.json")]
    report = evaluated(capsys, *argv)
    assert report["classes"]["red"]["point"]["threshold"] == 0.85
    assert report["classes"]["blue"]["point"]["threshold"] is None
    evaluate.main(["--draws", "3", *argv])
    assert "operating points: those of the exported file" in capsys.readouterr().out


def test_an_exported_file_predicts_pictures(tmp_path, data, capsys):
    points = {"red": 0.85, "blue": 0.1}
    calibration = {
        name: {"method": "platt", "scores": [0.1, 0.9], "values": [0.2, 0.7]} for name in points
    }
    metadata = {**METADATA, "operating_points": points, "calibration": calibration}
    path = str(made_onnx(tmp_path, metadata=metadata))
    argv = [path, str(data / "0.png"), "--format", "csv", "--output", str(tmp_path / "out")]
    predict.main(argv)
    assert "1 pictures, 2 boxes (red 1, blue 1)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"gives detections above a score of 0\.05 alone"):
        predict.main([*argv, "--threshold", "0.01"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resize": {"kind": "shortest_edge", "min": 800}}, "resizes by .*expected shortest_edge"),
        ({"resize": {"kind": "round"}}, "resizes by .*expected shortest_edge"),
        ({"operating_points": {"red": 0.5}}, "operating points that can't be used"),
    ],
)
def test_metadata_that_an_evaluation_cannot_use_is_named(tmp_path, data, changes, words):
    made_onnx(tmp_path, metadata={**METADATA, **changes})
    with pytest.raises(SystemExit, match=words):
        evaluate.main([str(tmp_path), "--data", str(data / "a.json"), "--draws", "3"])


def test_pictures_that_the_file_does_not_resize_stay_as_they_are(tmp_path):
    made_onnx(tmp_path, metadata={**METADATA, "resize": {"kind": "none"}})
    assert open_run(tmp_path).cfg.INPUT.MIN_SIZE_TEST == 0
