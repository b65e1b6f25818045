"""What a step asks of a device, counted on a CPU that pretends to be one.

The table of docs/BENCHMARKS.md: python tests/test_waits.py
"""

import copy

import pytest
import torch
from conftest import PLUGIN, STOCK, pictures, small_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from pretend import Counting, to_device
from torch import nn

from retina_focal import add_retina_focal_config

SIZES = [(64, 96), (96, 64), (64, 64), (33, 70)]
NUM_BOXES = [6, 3, 0, 2]
# R-50 with few channels, on whose number the counts do not depend.
R_50 = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    "MODEL.FPN.OUT_CHANNELS": 16,
}


def model_of(names: dict, **changes: int) -> nn.Module:
    """detectron2's or ours, R-18 by default, with frozen norms and random weights, on the CPU."""
    cfg = small_cfg(norm="FrozenBN", **names, **changes)
    if names is PLUGIN:
        add_retina_focal_config(cfg)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.test_score_thresh = 0.005  # below pi, so that there are detections
    return model


def batch_of(num_images: int) -> list[dict]:
    times = -(-num_images // len(SIZES))
    return pictures((SIZES * times)[:num_images], (NUM_BOXES * times)[:num_images])


def train(model: nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
    return losses


@torch.no_grad()
def infer(model: nn.Module, batch: list[dict]) -> list[dict]:
    return model(batch)


def counted(act, model: nn.Module, batch: list[dict]) -> Counting:
    """Of the second call: the first makes the anchors, and folds norms for inference."""
    model.train(act is train)
    for _ in range(2):
        with Counting() as counting:
            act(model, batch)
    return counting


def count_of(counting: Counting) -> tuple[int, int]:
    """Waits and operations."""
    return sum(counting.waits.values()), sum(counting.operations.values())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return to_device(model_of(PLUGIN))


@pytest.fixture(scope="module")
def steps(model) -> dict[int, Counting]:
    return {n: counted(train, model, batch_of(n)) for n in (1, 3, 8)}


@pytest.mark.parametrize("num_images", [1, 3, 8])
def test_a_training_step_waits_once(steps, num_images):
    waits = steps[num_images].waits
    assert sum(waits.values()) == 1, waits
    assert "retina_focal/targets.py" in next(iter(waits))


def test_the_wait_is_before_the_network(model):
    """The host of a GPU would otherwise wait for the forward pass."""
    seen = []
    model.train()
    with Counting() as counting:
        hooks = [
            model.backbone.register_forward_pre_hook(lambda *_: seen.append(dict(counting.waits))),
            model.criterion.register_forward_pre_hook(lambda *_: seen.append(dict(counting.waits))),
        ]
        train(model, batch_of(2))
    for hook in hooks:
        hook.remove()
    assert seen == 2 * [dict(counting.waits)] and len(seen[0]) == 1


def test_an_image_more_is_one_operation_more(steps):
    """It is written into the batch. Matching and losses take all images at once."""
    operations = {n: count_of(step)[1] for n, step in steps.items()}
    assert operations[8] - operations[3] == 5 and operations[3] - operations[1] <= 2


@pytest.mark.parametrize("num_images", [1, 3, 8])
def test_inference_waits_three_times(model, num_images):
    waits = counted(infer, model, batch_of(num_images)).waits
    assert sum(waits.values()) == 3, waits


@pytest.mark.parametrize("act", [train, infer])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_cross_in_one_copy_and_in_their_dtype(model, act, dtype):
    batch = batch_of(3)
    for record in batch:
        record["image"] = record["image"].to(dtype)
    copies = counted(act, model, batch).copies
    num_bytes = sum(record["image"].nbytes for record in batch)
    assert [x.num_bytes for x in copies if x.num_bytes > 5_000] == [num_bytes]
    assert sum(x.num_bytes for x in copies) < num_bytes + 1_000  # boxes, classes, sizes


def test_boxes_and_classes_of_all_images_cross_in_one_copy(steps):
    for n, step in steps.items():
        targets = [x["instances"] for x in batch_of(n)]
        num_bytes = sum(x.gt_boxes.tensor.nbytes + x.gt_classes.nbytes for x in targets)
        of_images = sum(x["image"].nbytes for x in batch_of(n))
        others = [x.num_bytes for x in step.copies if x.num_bytes != of_images]
        # Besides: boxes of each image, the first of them, and a table of four numbers per level.
        assert sorted(others) == sorted([num_bytes, 8 * n, 8 * n, 8 * 4 * 5])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_are_normalised_and_padded_as_detectron2_does(model, dtype):
    batch = batch_of(3)
    for record in batch:
        record["image"] = record["image"].to(dtype)
    expected = model_of(STOCK).preprocess_image(batch)
    found = model_of(PLUGIN).preprocess_image(batch)
    assert torch.equal(found.tensor, expected.tensor)
    assert found.image_sizes == expected.image_sizes
    with Counting():
        assert torch.equal(model.preprocess_image(batch).tensor.held, expected.tensor)


def test_losses_gradients_and_detections_are_those_of_the_cpu():
    on_cpu = model_of(PLUGIN)
    on_device, batch = to_device(copy.deepcopy(on_cpu)), batch_of(4)
    for record in batch:
        record["height"], record["width"] = 100, 333
    expected_losses, expected = train(on_cpu, batch), infer(on_cpu.eval(), batch)
    with Counting():
        losses, found = train(on_device, batch), infer(on_device.eval(), batch)
    for name, loss in expected_losses.items():
        # 1e-5: fp32 sums in another order.
        torch.testing.assert_close(losses[name].held, loss, rtol=1e-5, atol=0)
    for (name, x), y in zip(on_cpu.named_parameters(), on_device.parameters(), strict=True):
        torch.testing.assert_close(y.grad.held, x.grad, rtol=1e-3, atol=1e-5, msg=name)
    for x, y in zip(expected, found, strict=True):
        x, y = x["instances"], y["instances"]
        assert len(x) == len(y) > 0 and x.image_size == y.image_size == (100, 333)
        torch.testing.assert_close(y.scores.held, x.scores, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            y.pred_boxes.tensor.held, x.pred_boxes.tensor, rtol=1e-4, atol=1e-2
        )
        assert torch.equal(y.pred_classes.held, x.pred_classes)


def test_a_training_step_of_16_images_has_at_most_0_6_of_stocks_operations():
    batch = pictures([(32, 32)] * 16, [1] * 16)
    stock, ours = (
        count_of(counted(train, to_device(model_of(names, **R_50)), batch))[1]
        for names in (STOCK, PLUGIN)
    )
    assert ours <= 0.6 * stock, (ours, stock)


def print_table() -> None:
    """Waits and operations of R-50-FPN, stock's and ours, as Markdown."""
    print("| | waits, stock | waits, ours | operations, stock | operations, ours |")
    print("| --- | --- | --- | --- | --- |")
    models = [to_device(model_of(names, **R_50)) for names in (STOCK, PLUGIN)]
    for name, act, sizes in (
        ("training step", train, (2, 4, 16)),
        ("inference", infer, (1, 2, 16)),
    ):
        for size in sizes:
            counts = [count_of(counted(act, model, batch_of(size))) for model in models]
            cells = [f"{number:,}" for pair in zip(*counts, strict=True) for number in pair]
            images = "1 image" if size == 1 else f"{size} images"
            print(f"| {name}, {images} | {' | '.join(cells)} |")


if __name__ == "__main__":
    print_table()
