"""The benchmark's command and its report: quotients of what was timed."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import table_rows
from test_benchmark_cases import SMALL, run_once, setting_of

from retina_focal.tools import cli
from retina_focal.tools.benchmark import cases, instruments, report
from retina_focal.tools.benchmark import command as benchmark
from retina_focal.tools.benchmark.models import MODELS, Setting


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of()


def test_ratios_are_medians_of_the_quotients_within_a_round(setting):
    """Not the quotient of the medians: that of (1, 2, 9) by (1, 4, 3) is 2 / 3."""
    records = [
        {"stock": {"a": x / 2, "b": x / 2}, "ours": {"a": y, "b": 0.0}}
        for x, y in ((1.0, 1.0), (2.0, 4.0), (9.0, 3.0))
    ]
    whole, a, b = report.rows_of("title", setting, records)
    assert [whole["part"], a["part"], b["part"]] == ["whole", "a", "b"]
    assert whole["values"] == {"stock": [1.0, 2.0, 9.0], "ours": [1.0, 4.0, 3.0]}
    assert whole["median"] == {"stock": 2.0, "ours": 3.0}
    assert whole["ratio"] == {"stock": {"median": 1.0, "min": 0.5, "max": 3.0}}
    assert a["ratio"]["stock"]["median"] == 0.5


@pytest.mark.parametrize("ours", [{}, {"memory": 0.0}], ids=["killed", "no growth"])
def test_without_a_base_there_is_no_ratio(setting, ours):
    records = [{"stock": {"memory": 8e6}, "ours": ours}]
    rows = report.rows_of("title", setting, records)
    assert [(x["unit"], x["ratio"]) for x in rows] == [("bytes", {})]
    content = dict.fromkeys(["command", "processor", "threads", "date", "rounds"], "x")
    content |= dict.fromkeys(["torch", "torchvision", "detectron2"], "x") | {"rows": rows}
    cells = table_rows(report.markdown(content))[2]
    assert cells[:5] == ["title", "80", "20", "fp32", "8 MB"]
    json.dumps(content, allow_nan=False)


def test_a_model_that_was_killed_is_left_out(setting):
    records = [{"stock": {}, "torchvision": {"memory": 8.0}, "ours": {"memory": 2.0}}]
    (row,) = report.rows_of("title", setting, records)
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
        patch.setattr(instruments, "WARM_UP", 0)
        cli.main(["benchmark", *argv, "--output", str(folder), *SMALL])
    return folder


def test_a_run_leaves_json_markdown_and_a_plot(output):
    assert sorted(x.name for x in output.iterdir()) == [
        "results.json", "results.md", "results.png"
    ]  # fmt: skip
    content = json.loads((output / "results.json").read_text())
    assert content["command"].startswith("retina-focal benchmark --what loss,matching")
    assert content["processor"] and content["torch"] == torch.__version__
    assert content["threads"] == 1
    fields = "what", "boxes", "precision"
    titles = [tuple(x[f] for f in fields) for x in content["rows"] if x["part"] == "whole"]
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
    rows = table_rows((output / "results.md").read_text())
    for title, boxes, precision in titles:
        assert [title, "80", str(boxes), precision] in [row[:4] for row in rows]
    assert {len(row) for row in rows} == {9, 7}  # the second is for the convolutions' two columns


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
            if len(calls) > 3 * instruments.WARM_UP + 3 * 2 + 1:  # in the third round
                raise KeyboardInterrupt
            stopwatch.start()
            stopwatch.mark("part")

        return dict.fromkeys(names, run)

    monkeypatch.setitem(cases.TIMED, "loss", {"classification loss": interrupted})
    argv = ["--what", "loss,train", "--rounds", "9", "--threads", "1", "--device", "cpu"]
    benchmark.main([*argv, "--output", str(tmp_path), *SMALL])
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {name: len(x) for name, x in row["values"].items()} == dict.fromkeys(MODELS, 2)
    printed = capsys.readouterr().out
    assert "interrupted" in printed
    assert table_rows(printed)[2][:3] == ["classification loss", "80", "20"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--what", "loss,speed"], "'speed' is not one of loss, matching"),
        (["--boxes", "20,0"], "'0' is not a whole number of at least 1"),
        (["--image-size", "800"], "'800' is not HxW"),
        (["--image-size", "800xwide"], "'wide' is not a whole number"),
        (["--rounds", "1.5"], "'1.5' is not a whole number"),
    ],
)
def test_a_wrong_argument_is_refused_in_words(argv, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(argv)
    assert message in capsys.readouterr().err


def test_a_config_needs_no_dataset_and_no_weights():
    argv = ["--config-file", "quick_start/bccd.yaml", "--classes", "1,3", "--boxes", "1,20"]
    argv += ["--image-size", "64x96"]
    args = benchmark.parse_args(argv)
    settings = benchmark.settings_of(args, benchmark.config_of(args))
    assert [(x.classes, x.boxes) for x in settings] == [(1, 1), (1, 20), (3, 1), (3, 20)]
    run_once(cases.training_step, settings[0], ["stock", "ours"])


def test_precision_is_that_of_our_model_alone():
    args = benchmark.parse_args(["--precision", "fp32,bf16", *SMALL, "MODEL.DEVICE", "cpu"])
    settings = benchmark.settings_of(args, benchmark.config_of(args))
    assert [setting.precision for setting in settings] == ["fp32", "bf16"]
    dtypes = []
    for setting in settings:
        setting = replace(setting, image_size=(64, 96))
        with instruments.ConvolutionRecorder() as recorder:
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


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(tmp_path):
    argv = ["--what", "memory", "--image-size", "64x96", "--rounds", "1", "--threads", "1"]
    cli.main(["benchmark", *argv, "--output", str(tmp_path), *SMALL])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows and all(x["unit"] == "bytes" and min(x["median"].values()) >= 0 for x in rows)
