"""The benchmark's rows of a GPU, tried on a CPU: what they compute in, their files, their table."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import table_rows
from test_benchmark_cases import SMALL, setting_of

from retina_focal.tools.benchmark import cases, gpu, gpu_report, instruments
from retina_focal.tools.benchmark import command as benchmark
from retina_focal.tools.benchmark.gpu import PRECISIONS
from retina_focal.tools.benchmark.instruments import Stopwatch, Unwatched

GPU_ROWS = ["--device", "cpu", "--gpu-rows", "--threads", "1", "--image-size", "64x96"]


def jobs_of(what: str, precisions=tuple(PRECISIONS), batches=(1,), boxes=(3,)) -> list[gpu.Job]:
    return [*gpu.jobs(setting_of().cfg, [what], (64, 96), batches, boxes, precisions)]


def test_every_model_has_a_row_in_every_precision():
    rows = [
        (job.setting.batch, job.precision, job.models) for job in jobs_of("train", batches=(1, 2))
    ]
    all_models = "stock", "torchvision", "ours"
    assert rows == [
        (batch, precision, ("ours",) if precision == "ours-bf16" else all_models)
        for batch in (2, 1)  # what matters most comes first
        for precision in PRECISIONS
    ]
    boxes = [[job.setting.boxes for job in jobs_of(what, boxes=(3, 5))] for what in gpu.WHAT]
    assert {*boxes[gpu.WHAT.index("matching")]} == {3, 5}
    assert all({*b} == {3} for what, b in zip(gpu.WHAT, boxes, strict=True) if what != "matching")


@pytest.mark.parametrize(
    "precision, dtype",
    [("ieee-fp32", torch.float32), ("amp-bf16", torch.bfloat16), ("ours-bf16", torch.bfloat16)],
)
def test_a_row_computes_in_what_its_name_says(precision, dtype):
    (job,) = jobs_of("train", [precision])
    for model, run in job.make_runs(job.setting, job.models).items():
        with instruments.ConvolutionRecorder() as recorder:
            run(Unwatched("cpu"))
        forward = [x for function, x in recorder.calls if function is instruments.CONVOLUTIONS[0]]
        assert {x[1].dtype for x in forward} == {dtype}, model


def test_fp16_is_trained_with_a_scaled_loss(monkeypatch):
    """bf16 stands for fp16, which is slow on a CPU."""
    setting = replace(setting_of((32, 32)), half=torch.bfloat16, amp=True)
    scaled = []
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch, "float16", torch.bfloat16)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: Spy(real(*args, **kwargs)))

    class Spy:
        def __init__(self, scaler):
            self.scaler = scaler

        def scale(self, loss):
            scaled.append((self.scaler.scale(loss) / loss).item())
            return self.scaler.scale(loss)

    cases.training_step(setting, ["ours"])["ours"](Unwatched("cpu"))
    cases.training_step(replace(setting, amp=False), ["ours"])["ours"](Unwatched("cpu"))
    assert scaled == [65536.0, 1.0]


@pytest.mark.parametrize("case", [cases.training_step, cases.inference])
def test_torchvisions_images_are_copied_inside_the_timed_region(case, monkeypatch):
    order = []
    images_for = cases.arguments.__globals__["images_for"]

    def noted(name, batch, device):
        order.append("copied")
        return images_for(name, batch, device)

    class Noted(Stopwatch):
        def start(self):
            order.append("started")
            super().start()

        def mark(self, part):
            order.append(part)
            super().mark(part)

    monkeypatch.setitem(cases.arguments.__globals__, "images_for", noted)
    monkeypatch.setattr(cases, "images_for", noted)
    run = case(setting_of((64, 96)), ["torchvision"])["torchvision"]
    assert order == []
    run(Noted("cpu"))
    assert order[:4] == ["started", None, "copied", "network, forward"]


def test_half_logits_are_given_as_our_head_gives_them():
    loss = jobs_of("loss", ["amp-bf16"])[0]
    runs = loss.make_runs(loss.setting, loss.models)
    results = {name: run(Unwatched("cpu")) for name, run in runs.items()}
    full = cases.classification_loss(replace(loss.setting, half=None), ["ours"])["ours"]
    value, _ = full(Unwatched("cpu"))
    for name, (found, gradients) in results.items():
        assert {x.dtype for x in gradients} == {torch.bfloat16}
        if name in ("stock", "ours"):
            # 2^-8 is what bf16 rounds a logit by.
            torch.testing.assert_close(found.float(), value, rtol=2**-7, atol=0)
    sizes = cases.anchors_per_level(loss.setting)[1]
    assert loss.floor_bytes() == 6 * 80 * sum(x.numel() for x in sizes)


def fake(calls: list[str], error: Exception):
    """A case without a network, in which torchvision's model raises."""

    def case(setting, names):
        def run(name: str, stopwatch: Stopwatch) -> None:
            calls.append(name)
            if name == "torchvision":
                raise error
            stopwatch.start()
            stopwatch.mark("part")

        return {name: lambda stopwatch, name=name: run(name, stopwatch) for name in names}

    return case


NO_MEMORY = torch.OutOfMemoryError("tried to allocate\nmore")


def run_fake(
    folder, monkeypatch, what="train,matching", interrupt_in: str = "", error=NO_MEMORY
) -> list[str]:
    calls = []
    for name in ("train", "matching"):
        monkeypatch.setitem(cases.TIMED, name, {name: fake(calls, error)})

    def interrupted(setting, names):
        raise KeyboardInterrupt

    if interrupt_in:
        monkeypatch.setitem(cases.TIMED, interrupt_in, {interrupt_in: interrupted})
    argv = [*GPU_ROWS, "--what", what, "--precision", "ieee-fp32,ours-bf16", "--batch", "1"]
    benchmark.main([*argv, "--rounds", "2", "--output", str(folder), *SMALL])
    return calls


def test_an_interrupted_run_goes_on_and_a_finished_one_starts_anew(tmp_path, monkeypatch, capsys):
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert run_fake(tmp_path, monkeypatch, interrupt_in="matching")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == flags
    first = json.loads((tmp_path / "results.json").read_text())
    assert {row["what"] for row in first["rows"]} == {"train"} and not first["finished"]
    assert "interrupted" in capsys.readouterr().out
    assert run_fake(tmp_path, monkeypatch)
    second = json.loads((tmp_path / "results.json").read_text())
    assert second["finished"] and second["rows"][: len(first["rows"])] == first["rows"]
    assert {row["what"] for row in second["rows"]} == {"train", "matching"}
    assert "going on from the 4 rows" in capsys.readouterr().out
    run_fake(tmp_path, monkeypatch)
    third = json.loads((tmp_path / "results.json").read_text())
    assert third["rows"][0]["step"] != first["rows"][0]["step"]


def test_rows_of_other_code_are_not_continued(tmp_path, monkeypatch):
    run_fake(tmp_path, monkeypatch, interrupt_in="matching")
    monkeypatch.setattr(gpu_report, "source_digest", lambda: "other")
    assert "stock" in run_fake(tmp_path, monkeypatch, interrupt_in="matching")


def test_a_file_that_is_no_report_is_not_continued(tmp_path):
    path = tmp_path / "results.json"
    for text in ("", "[]", "{", '{"rows": []}'):
        path.write_text(text)
        assert gpu_report.started(path, {"command": "x", "rows": []}) == {
            "command": "x", "rows": []
        }  # fmt: skip


def test_a_model_without_memory_keeps_its_row(tmp_path, monkeypatch):
    run_fake(tmp_path, monkeypatch)
    rows = {
        row["model"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]
    }
    error = "OutOfMemoryError: tried to allocate"
    assert rows["torchvision"]["error"] == error and not rows["torchvision"]["step"]
    assert len(rows["stock"]["step"]) == len(rows["ours"]["latency"]) == 2
    table = table_rows((tmp_path / "results.md").read_text())
    assert [row[5] for row in table if row[4] == "torchvision"][:1] == ["no memory"]


def test_a_row_that_fails_leaves_the_others_and_is_measured_again(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="ieee-fp32, torchvision failed: RuntimeError: CUDA error"):
        run_fake(tmp_path, monkeypatch, error=RuntimeError("CUDA error: capture\nmore"))
    first = json.loads((tmp_path / "results.json").read_text())
    assert len(first["rows"]) == 7 and not first["finished"]
    table = table_rows((tmp_path / "results.md").read_text())
    assert {row[5] for row in table if row[4] == "torchvision"} == {"failed"}
    assert "torchvision" in run_fake(tmp_path, monkeypatch)
    second = json.loads((tmp_path / "results.json").read_text())
    assert second["finished"] and all("capture" not in x.get("error", "") for x in second["rows"])


def test_no_row_is_begun_after_the_last_second(tmp_path, monkeypatch):
    argv = [*GPU_ROWS, "--what", "matching", "--seconds", "0", "--output", str(tmp_path), *SMALL]
    benchmark.main(argv)
    assert not (tmp_path / "results.md").exists()


def test_ratios_and_floors_are_quotients_of_the_same_setting():
    def row(what, model, precision, step, memory=None, floor_bytes=None, batch=2):
        names = {"what": what, "batch": batch, "classes": 80, "boxes": 3, "precision": precision}
        times = {"step": step, "latency": step, "host": step}
        return {**names, "model": model, **times, "memory": memory, "floor_bytes": floor_bytes}

    rows = [
        row("training step", "stock", "ieee-fp32", [8.0, 6.0, 9.0], memory=3e6),
        row("training step", "ours", "ieee-fp32", [2.0, 3.0, 3.0], memory=1e6),
        row("training step", "ours", "ours-bf16", [1.0, 1.0, 1.0]),
        row("training step", "stock", "ieee-fp32", [100.0] * 3, batch=1),
        row("training step over its convolutions", "convolutions", "ieee-fp32", [1.0, 2.0, 1.0]),
        row("classification loss", "ours", "ieee-fp32", [4.0] * 3, floor_bytes=20.0),
    ]
    cells = [gpu_report._cells(x, rows, copied=10.0)[-4:] for x in rows]
    assert cells[0] == ["-", "-", "1.00", "8.00"]
    assert cells[1] == ["3.00", "3.00", "3.00", "2.00"]
    assert cells[2] == ["-", "8.00", "-", "-"]
    assert cells[5] == ["-", "-", "-", "2.00"]
    bars = [x for x in gpu_report.bars(rows) if x["ratio"]]
    assert [(x["precision"], x["ratio"]["stock"]) for x in bars] == [
        ("ieee-fp32", {"median": 3.0, "min": 2.0, "max": 4.0}),
        ("ieee-fp32 / ours-bf16", {"median": 8.0, "min": 6.0, "max": 9.0}),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu-rows", "--precision", "bf16"], "--precision bf16 is not for a GPU; expected ieee"),
        (["--gpu-rows", "--what", "memory"], "--what memory is not for a GPU; expected loss,"),
        (["--gpu-rows", "--classes", "3,5"], "--classes has 2 numbers"),
        (["--precision", "tf32"], "--precision tf32 is not for a CPU; expected fp32,"),
        (["--what", "profile"], "--what profile is not for a CPU"),
        (["--batch", "1,2"], r"--batch has 2 numbers, \[1, 2\]; on a CPU give one"),
    ],
)
def test_what_is_for_another_device_is_refused_in_words(argv, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        benchmark.main([*argv, "--device", "cpu", "--output", str(tmp_path), *SMALL])
