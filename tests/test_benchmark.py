"""The benchmark times equal work, and reports the quotients of what it timed."""

import json
import math
import os
import signal
import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage

from retina_focal import box_tower
from retina_focal.tools import cli
from retina_focal.tools.benchmark import cases
from retina_focal.tools.benchmark import command as benchmark
from retina_focal.tools.benchmark.cases import MODELS, Setting, Stopwatch
from retina_focal.tools.common import load_cfg

SMALL = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def setting_of(size: tuple[int, int] = (96, 128), batch: int = 1, boxes: int = 20) -> Setting:
    return Setting(load_cfg(CONFIG, [*SMALL, "MODEL.DEVICE", "cpu"]), size, batch, boxes)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of()


def run_once(case, setting: Setting, names=MODELS) -> dict:
    """What each model's run returns."""
    runs = case(setting, names)
    return {name: run(Stopwatch("cpu")) for name, run in runs.items()}


# The work


def test_pictures_have_the_boxes_that_the_help_promises():
    setting = setting_of(size=(90, 130), batch=2, boxes=2000)
    batch = cases.pictures(setting)
    assert len(batch) == 2
    for record in batch:
        assert record["image"].shape == (3, 90, 130) and record["image"].dtype == torch.uint8
        boxes = record["instances"].gt_boxes.tensor
        side = boxes[:, 2:] - boxes[:, :2]
        assert len(boxes) == 2000
        # 1e-3 px: corner + side, rounded, may end past the edge.
        assert (boxes >= 0).all() and (boxes <= torch.tensor([130, 90] * 2) + 1e-3).all()
        assert (side > 8 - 1e-3).all() and (side < torch.tensor([65, 45]) + 1e-3).all()
        # Log-uniform: the median is the geometric mean; 2,000 draws know it to a few percent.
        expected = torch.tensor([(8 * 65) ** 0.5, (8 * 45) ** 0.5])
        torch.testing.assert_close(side.median(0).values, expected, rtol=0.1, atol=0)
    assert not torch.equal(batch[0]["image"], batch[1]["image"])


def test_shapes_equal_those_of_the_network():
    setting = setting_of(size=(100, 150), batch=2)
    model = cases.build("ours", setting).eval()
    images = model.preprocess_image(cases.pictures(setting)).tensor
    features = [model.backbone(images)[name] for name in model.head_in_features]
    logits, deltas = model.head(features)
    expected = model.anchor_generator(features)
    anchors, sizes = cases.anchors_per_level(setting)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(anchors, expected, strict=True))
    outputs = cases._random_outputs(setting, std=1.0)
    assert [x.shape for x in outputs[0]] == [x.shape for x in logits]
    assert [x.shape for x in outputs[1]] == [x.shape for x in deltas]
    assert all(len(a) == s[1] * s[2] * s[3] for a, s in zip(anchors, sizes, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_loss_and_gradient_are_the_same_for_all(batch):
    results = run_once(cases.classification_loss, setting_of(batch=batch))
    value, gradients = results["ours"]
    # torchvision divides by each image's own positives: the same for one image.
    for name in MODELS if batch == 1 else ("stock", "ours"):
        # 1e-5: fp32 sums in another order.
        torch.testing.assert_close(results[name][0], value, rtol=1e-5, atol=0)
        for found, expected in zip(results[name][1], gradients, strict=True):
            assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_stock_loss_is_that_of_detectron2(setting):
    """Its own `losses`, to the last bit."""
    logits, deltas = cases._random_outputs(setting, std=1.0)
    stock = cases.build("stock", setting)
    anchors, _ = cases.anchors_per_level(setting)
    gt_instances = [record["instances"] for record in cases.pictures(setting)]
    labels, gt_boxes = stock.label_anchors(anchors, gt_instances)
    predictions = stock._transpose_dense_predictions([logits, deltas], [setting.classes, 4])
    with EventStorage() as storage:
        losses = stock.losses(anchors, predictions[0], labels, predictions[1], gt_boxes)
        num_positives = storage.latest()["num_pos_anchors"][0]
    expected = losses["loss_cls"] * stock.loss_normalizer / num_positives
    (value, _) = run_once(cases.classification_loss, setting, ["stock"])["stock"]
    # 1e-6: the quotient is taken another way round.
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_matches_are_the_same_for_all():
    setting = setting_of(batch=2, boxes=60)
    results = run_once(cases.matching, setting)
    labels, matched_idxs = results["ours"]
    assert torch.equal(labels, torch.stack(results["stock"][0]))
    for i, theirs in enumerate(results["torchvision"]):
        positive = (labels[i] >= 0) & (labels[i] < setting.classes)
        assert positive.any() and (labels[i] == -1).any()
        assert torch.equal(theirs >= 0, positive)
        assert torch.equal(theirs == -2, labels[i] == -1)
        assert torch.equal(theirs[positive], matched_idxs[i][positive])


def test_the_first_training_step_of_stock_and_ours_is_the_same(setting):
    results = run_once(cases.training_step, setting)
    assert results["stock"].keys() == results["ours"].keys()
    for name, loss in results["ours"].items():
        # 1e-5: R-18 and head in fp32, sums in another order.
        torch.testing.assert_close(loss, results["stock"][name], rtol=1e-5, atol=0)
    assert all(loss.isfinite() for loss in results["torchvision"].values())


@pytest.mark.parametrize("size", [(96, 128), (800, 1216), (375, 501)])
def test_torchvision_sees_the_image_in_its_size(size):
    setting = setting_of(size)
    model = cases.build("torchvision", setting)
    images, targets = cases._arguments("torchvision", cases.pictures(setting), "cpu")
    transformed, _ = model.transform(images, targets)
    assert transformed.image_sizes == [size]
    ours = cases.build("ours", setting).preprocess_image(cases.pictures(setting))
    assert transformed.tensors.shape == ours.tensor.shape


def test_realistic_logits_saturate_the_candidates_of_p3_to_p5():
    setting = setting_of((800, 1216), batch=2)
    node = setting.cfg.MODEL.RETINANET
    logits = cases.realistic_logits(setting)
    for i, level in enumerate(logits):
        passing = (level.sigmoid() > node.SCORE_THRESH_TEST).flatten(1).double()
        if i < 3:
            assert (passing.sum(1) >= node.TOPK_CANDIDATES_TEST).all()
            # 1% of 684,000 pairs or more is known to 1.2% (one sigma).
            np.testing.assert_allclose(passing.mean(1), 0.01, rtol=0.05)
        else:
            assert not passing.any()


@pytest.mark.parametrize(
    ("case", "count"), [(cases.inference, 0), (cases.inference_realistic, 100)]
)
def test_detections_of_stock_and_ours_are_the_same(setting, case, count):
    """None on an initialised model, whose scores are 0.01, and as many as allowed otherwise."""
    results = run_once(case, setting)
    stock, ours = (results[name][0]["instances"] for name in ("stock", "ours"))
    assert len(stock) == len(ours) == len(results["torchvision"][0]["boxes"]) == count
    torch.testing.assert_close(ours.scores, stock.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        ours.pred_boxes.tensor.sum(0), stock.pred_boxes.tensor.sum(0), rtol=1e-4, atol=0
    )


def test_realistic_logits_stay_for_the_next_run(setting):
    """Stock takes the sigmoid in place, and on a level of one cell permuting makes no copy."""
    cfg = setting.cfg.clone()
    cfg.defrost()
    cfg.TEST.DETECTIONS_PER_IMAGE = 5000  # P7's background would come last
    all_of_them = replace(setting, cfg=cfg)
    assert cases.anchors_per_level(all_of_them)[1][-1][2:] == (1, 1)
    run = cases.inference_realistic(all_of_them, ["stock"])["stock"]
    first, second = (run(Stopwatch("cpu"))[0]["instances"] for _ in range(2))
    assert torch.equal(first.scores, second.scores)


def flops_of(arguments: tuple) -> int:
    """Multiply-adds of a forward convolution, from its output's size."""
    x, weight, _, stride, padding, dilation, transposed, *_ = arguments
    assert not transposed
    out = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return x.shape[0] * out[0] * out[1] * weight.shape.numel()


def test_recorded_convolutions_are_those_of_the_model(setting, monkeypatch):
    monkeypatch.setattr(box_tower, "COST_OF_A_CELL", math.inf)  # the box tower on whole maps
    step = cases.training_step(setting, ["ours"])["ours"]
    with cases.ConvolutionRecorder() as recorder:
        step(Stopwatch("cpu"))
    forward = [args for func, args in recorder.calls if func is cases.CONVOLUTIONS[0]]
    backward = [args for func, args in recorder.calls if func is cases.CONVOLUTIONS[1]]
    model = cases.build("ours", setting).eval()
    counted = FlopCountAnalysis(model, (cases.pictures(setting),)).by_operator()["conv"]
    assert sum(map(flops_of, forward)) == counted
    # FREEZE_AT 2: the stem and the four convolutions of res2 come first and have no backward.
    weights = [[args[1].shape for args in forward[5:]], [args[2].shape for args in backward]]
    assert sorted(weights[0]) == sorted(weights[1])
    frozen = [p for p in model.backbone.parameters() if p.dim() == 4 and not p.requires_grad]
    assert [x.shape for x in frozen] == [args[1].shape for args in forward[:5]]


def test_the_products_of_a_box_tower_at_few_cells_are_recorded(setting, monkeypatch):
    monkeypatch.setattr(box_tower, "COST_OF_A_CELL", 0)
    step = cases.training_step(setting, ["ours"])["ours"]
    with cases.ConvolutionRecorder() as recorder:
        step(Stopwatch("cpu"))
    forward = [args for func, args in recorder.calls if func is cases.MATRIX_PRODUCTS[0]]
    # Four convolutions and the output, on fewer and fewer cells.
    assert [args[2].shape[0] for args in forward] == [9 * 256] * 5
    cells = [args[1].shape[0] for args in forward]
    assert cells == sorted(cells, reverse=True)


def test_the_replay_makes_tensors_like_those_of_the_step():
    x = torch.rand(2, 8, 5, 7).to(memory_format=torch.channels_last).bfloat16()
    weight = torch.rand(4, 8, 3, 3, dtype=torch.bfloat16)
    with cases.ConvolutionRecorder() as recorder:
        torch.nn.functional.conv2d(x, weight)
    ((_, (like_x, like_weight, bias, *_)),) = recorder.calls
    for made, tensor in ((like_x.make(), x), (like_weight.make(), weight)):
        assert (made.shape, made.stride(), made.dtype) == (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
    assert bias is None


def test_stock_is_built_from_detectron2s_parts(setting):
    cfg = cases.stock_cfg(setting.cfg)
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.MODEL.BACKBONE.NAME == "build_retinanet_resnet_fpn_backbone"
    assert cfg.MODEL.ANCHOR_GENERATOR.NAME == "DefaultAnchorGenerator"
    model = build_model(cfg)
    assert not [m for m in model.modules() if type(m).__module__.startswith("retina_focal")]
    features = [torch.zeros(1, 1, 12 // 2**i + 1, 16 // 2**i + 1) for i in range(5)]
    ours = cases.build("ours", setting).anchor_generator(features)
    stock = model.anchor_generator(features)
    torch.testing.assert_close(Boxes.cat(ours).tensor, Boxes.cat(stock).tensor)


def test_stock_runs_timm_as_timm_made_it():
    cfg = load_cfg("quick_start/bccd.yaml", ["DATASETS.COCO_JSON", "[]", "MODEL.WEIGHTS", "''"])
    small = Setting(cfg, image_size=(64, 96), batch=1, boxes=2)
    stock, ours = (cases.build(name, small) for name in ("stock", "ours"))
    inside = [type(m).__module__ for m in stock.modules()]
    assert not [m for m in inside if m.startswith("retina_focal") and m != cases.__name__]
    state = stock.state_dict()
    assert all(
        torch.equal(state[name], x) for name, x in ours.state_dict().items() if name in state
    )
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (stock, ours)]
    assert trained[0] == trained[1]
    image = torch.randn(1, 3, 64, 96)
    for name, feature in ours.backbone(image).items():
        torch.testing.assert_close(stock.backbone(image)[name], feature, rtol=1e-4, atol=1e-4)


def test_torchvision_is_left_out_where_it_has_no_such_network(setting):
    assert cases.torchvision_has(setting.cfg)
    assert not cases.torchvision_has(small_cfg())  # 64 channels
    timm = load_cfg("quick_start/bccd.yaml", ["DATASETS.COCO_JSON", "[]"])
    assert not cases.torchvision_has(timm)


# The stopwatch and the report


def test_the_stopwatch_times_what_lies_before_each_mark(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    stopwatch = Stopwatch("cpu")
    stopwatch.start()
    stopwatch.mark("a")
    stopwatch.resume()
    stopwatch.mark("a")
    stopwatch.mark("b")
    assert stopwatch.seconds() == {"a": 1.0 + 4.0, "b": 8.0}


def test_ratios_are_medians_of_the_quotients_within_a_round(setting):
    """Not the quotient of the medians: that of (1, 2, 9) by (1, 4, 3) is 2 / 3."""
    records = [
        {"stock": {"a": x / 2, "b": x / 2}, "ours": {"a": y, "b": 0.0}}
        for x, y in ((1.0, 1.0), (2.0, 4.0), (9.0, 3.0))
    ]
    whole, a, b = benchmark.rows_of("title", setting, records)
    assert [whole["part"], a["part"], b["part"]] == ["whole", "a", "b"]
    assert whole["values"] == {"stock": [1.0, 2.0, 9.0], "ours": [1.0, 4.0, 3.0]}
    assert whole["median"] == {"stock": 2.0, "ours": 3.0}
    assert whole["ratio"] == {"stock": {"median": 1.0, "min": 0.5, "max": 3.0}}
    assert a["ratio"]["stock"]["median"] == 0.5


@pytest.mark.parametrize("ours", [{}, {"memory": 0.0}], ids=["killed", "no growth"])
def test_without_a_base_there_is_no_ratio(setting, ours):
    records = [{"stock": {"memory": 8e6}, "ours": ours}]
    rows = benchmark.rows_of("title", setting, records)
    assert [(x["unit"], x["ratio"]) for x in rows] == [("bytes", {})]
    report = dict.fromkeys(["command", "processor", "threads", "date", "rounds"], "x")
    report |= dict.fromkeys(["torch", "torchvision", "detectron2"], "x") | {"rows": rows}
    assert "| title | 80 | 20 | fp32 | 8 MB |" in benchmark.markdown(report)
    json.dumps(report, allow_nan=False)


def test_a_model_that_was_killed_is_left_out(setting):
    records = [{"stock": {}, "torchvision": {"memory": 8.0}, "ours": {"memory": 2.0}}]
    (row,) = benchmark.rows_of("title", setting, records)
    assert list(row["values"]) == ["torchvision", "ours"]
    assert row["ratio"]["torchvision"]["median"] == 4.0


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What one run over everything but memory leaves."""
    folder = tmp_path_factory.mktemp("benchmark")
    argv = ["--what", "loss,matching,train,inference,convolutions", "--image-size", "64x96"]
    argv += ["--rounds", "1", "--boxes", "3,5", "--threads", "1", "--device", "cpu"]
    argv += ["--precision", "fp32,bf16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "WARM_UP", 0)
        cli.main(["benchmark", *argv, "--output", str(folder), *SMALL])
    return folder


def test_a_run_leaves_json_markdown_and_a_plot(output):
    assert sorted(x.name for x in output.iterdir()) == [
        "results.json", "results.md", "results.png"
    ]  # fmt: skip
    report = json.loads((output / "results.json").read_text())
    assert report["command"].startswith("retina-focal benchmark --what loss,matching")
    assert report["processor"] and report["torch"] == torch.__version__ and report["threads"] == 1
    fields = "what", "boxes", "precision"
    titles = [tuple(x[f] for f in fields) for x in report["rows"] if x["part"] == "whole"]
    both = "fp32", "bf16"
    assert titles == [
        *[("classification loss", boxes, "fp32") for boxes in (3, 5)],
        *[("matching", boxes, "fp32") for boxes in (3, 5)],
        *[("training step", boxes, precision) for boxes in (3, 5) for precision in both],
        *[("inference, initialised", 3, precision) for precision in both],
        *[("inference, realistic", 3, precision) for precision in both],
        *[
            ("training step over its convolutions", boxes, precision)
            for boxes in (3, 5)
            for precision in both
        ],
    ]
    text = (output / "results.md").read_text()
    for title, boxes, precision in titles:
        assert f"| {title} | 80 | {boxes} | {precision} |" in text
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(columns) == {10, 8}  # the second is for the convolutions' two columns


def test_ratios_of_a_run_equal_the_quotients_of_its_times(output):
    rows = json.loads((output / "results.json").read_text())["rows"]
    for row in rows:
        base = row["values"][row["base"]]
        others = set(row["values"]) - {row["base"]}
        assert set(row["ratio"]) == others and others
        for name in others:
            quotients = [x / y for x, y in zip(row["values"][name], base, strict=True)]
            assert row["ratio"][name]["median"] == pytest.approx(statistics.median(quotients))


def test_parts_of_a_step_add_up_to_the_whole(output):
    rows = json.loads((output / "results.json").read_text())["rows"]
    steps = [x for x in rows if x["what"] == "training step" and x["boxes"] == 3]
    whole, *parts = [x for x in steps if x["precision"] == "fp32"]
    assert [x["part"] for x in parts] == ["network, forward", "matching and loss", "backward"]
    for name in MODELS:
        total = sum(x["values"][name][0] for x in parts)
        assert whole["values"][name][0] == pytest.approx(total)
        assert all(x["values"][name][0] > 0 for x in parts)


def test_an_interrupt_keeps_the_finished_rounds(tmp_path, monkeypatch, capsys):
    calls = []

    def interrupted(setting, names):
        def run(stopwatch):
            calls.append(1)
            if len(calls) > 3 * benchmark.WARM_UP + 3 * 2 + 1:  # in the third round
                raise KeyboardInterrupt
            stopwatch.start()
            stopwatch.mark("part")

        return dict.fromkeys(names, run)

    monkeypatch.setitem(benchmark.TIMED, "loss", {"classification loss": interrupted})
    argv = ["--what", "loss,train", "--rounds", "9", "--threads", "1", "--device", "cpu"]
    benchmark.main([*argv, "--output", str(tmp_path), *SMALL])
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {name: len(x) for name, x in row["values"].items()} == dict.fromkeys(MODELS, 2)
    printed = capsys.readouterr().out
    assert "interrupted" in printed and "| classification loss | 80 | 20 |" in printed


# Memory


def allocates_200_mb(setting, names):
    """A case whose runs allocate 200e6 bytes; "stock" dies as by the kernel's hand."""

    def run(name: str, stopwatch: Stopwatch) -> None:
        if name == "stock":
            os.kill(os.getpid(), signal.SIGKILL)
        torch.ones(50_000_000)

    return {name: lambda stopwatch, name=name: run(name, stopwatch) for name in names}


def test_memory_is_that_of_a_fresh_process_however_large_this_one_is(setting):
    large = torch.ones(150_000_000)  # 600 MB, which a child replaced by exec would start with
    probes = benchmark.memory_probes(allocates_200_mb, setting, ["ours", "stock"])
    assert len(large) and probes["ours"]()["memory"] == pytest.approx(200e6, rel=0.1)
    assert probes["stock"]() == {}


def test_memory_of_our_loss_is_its_gradient_and_little_more():
    """A gradient is as large as the logits; building has freed more than that before."""
    setting = setting_of((768, 1024))  # large beside the code that a first run pages in
    logits, _ = cases._random_outputs(setting, std=1.0)
    size = sum(x.nbytes for x in logits)
    probes = benchmark.memory_probes(cases.classification_loss, setting, ["ours"])
    # A tenth less: the kernel counts pages in batches. Half more: a chunk's temporaries.
    assert 0.9 * size < probes["ours"]()["memory"] < 1.5 * size


# What a user gets wrong


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--what", "loss,speed"], "'speed' is not one of loss, matching"),
        (["--boxes", "0"], "'0' is not a whole number above 0"),
        (["--image-size", "800"], "'800' is not HxW"),
    ],
)
def test_a_wrong_argument_is_refused_in_words(argv, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(argv)
    assert message in capsys.readouterr().err


def test_a_config_needs_no_data_set_and_no_weights():
    argv = ["--config-file", "quick_start/bccd.yaml", "--classes", "1,3", "--boxes", "1,20"]
    argv += ["--image-size", "64x96"]
    settings = benchmark.settings_of(benchmark.parse_args(argv))
    assert [(x.classes, x.boxes) for x in settings] == [(1, 1), (1, 20), (3, 1), (3, 20)]
    run_once(cases.training_step, settings[0], ["stock", "ours"])


def test_precision_is_that_of_our_model_alone():
    args = benchmark.parse_args(["--precision", "fp32,bf16", *SMALL, "MODEL.DEVICE", "cpu"])
    settings = benchmark.settings_of(args)
    assert [setting.precision for setting in settings] == ["fp32", "bf16"]
    dtypes = []
    for setting in settings:
        setting = replace(setting, image_size=(64, 96))
        with cases.ConvolutionRecorder() as recorder:
            run_once(cases.training_step, setting, ["stock"])
            stock = len(recorder.calls)
            run_once(cases.training_step, setting, ["ours"])
        calls = [arguments[0].dtype for _, arguments in recorder.calls]
        dtypes.append((set(calls[:stock]), set(calls[stock:])))
    assert dtypes == [
        ({torch.float32}, {torch.float32}), ({torch.float32}, {torch.bfloat16})
    ]  # fmt: skip


def test_a_config_of_another_architecture_is_refused_with_what_to_type(tmp_path):
    argv = ["--output", str(tmp_path), "MODEL.META_ARCHITECTURE", "RetinaNet"]
    with pytest.raises(SystemExit, match=r"add: MODEL\.META_ARCHITECTURE FocalRetinaNet"):
        benchmark.main(argv)


def test_fp32_that_is_not_ieee_is_refused(monkeypatch):
    benchmark.check_fp32("cpu")
    precision = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        with pytest.raises(ValueError, match=r"mkldnn\.conv\.fp32_precision is 'bf16'"):
            benchmark.check_fp32("cpu")
    finally:
        torch.backends.mkldnn.conv.fp32_precision = precision
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(ValueError, match="ONEDNN_DEFAULT_FPMATH_MODE is 'BF16'"):
        benchmark.check_fp32("cpu")
    # torch's default on a GPU.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(ValueError, match="NVIDIA_TF32_OVERRIDE=0"):
        benchmark.check_fp32("cuda")
