"""Laws of a GPU: the numbers of the CPU, a host that does not wait, no needless memory or copies.

`DEVICE=cpu` runs what a CPU can of each, and so does a machine without a GPU.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pretend
import pytest
import torch
import torch.distributed as dist
from conftest import PLUGIN, STOCK, pictures, small_cfg
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from test_assigner import retinanet_anchors
from test_dense_sum import definition_sum, random_case
from test_proposals import faster_rcnn_cfg
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retina_focal import (
    NORMALIZER_REGISTRY,
    Assigner,
    add_retina_focal_config,
    focal_star_loss,
    hinge_loss,
    kernels,
    sigmoid_focal_loss,
)
from retina_focal.box_tower import PendingDeltas
from retina_focal.dense_sum import LevelTargets, dense_loss_sum
from retina_focal.losses import DenseLoss, FocalStarLoss, HingeLoss, SigmoidFocalLoss
from retina_focal.places import Places
from retina_focal.postprocess import Postprocessor
from retina_focal.training.accumulation import accumulate_gradients
from retina_focal.training.processes import closed_process_group, distribute
from retina_focal.training.steps import StepTrainer

NO_GPU = "torch finds no GPU on this machine"
HAS_GPU = torch.cuda.is_available()
DEVICE = os.environ.get("DEVICE") or ("cuda" if HAS_GPU else "cpu")
ON_GPU = torch.device(DEVICE).type == "cuda"
pytestmark = pytest.mark.skipif(ON_GPU and not HAS_GPU, reason=NO_GPU)
only_gpu = pytest.mark.skipif(not ON_GPU, reason="DEVICE is cpu" if HAS_GPU else NO_GPU)
# A CPU has the same in test_processes.py, from less.
slow_on_cpu = (lambda test: test) if ON_GPU else pytest.mark.slow
# Of the host for the device: in a training step and in an inference, whatever the batch.
TRAINING_WAITS, INFERENCE_WAITS = 1, 3
SIZES = [(128, 160), (96, 128)]
K = 80


@pytest.fixture(autouse=True)
def _ieee_fp32() -> Iterator[None]:
    """torch lets the convolutions of a GPU compute in TF32, which has 10 bits."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


# The dense loss


LOSSES: dict[str, tuple[DenseLoss, Callable[[Tensor, Tensor], Tensor]]] = {
    "focal": (SigmoidFocalLoss(), sigmoid_focal_loss),
    "gamma 0.5": (SigmoidFocalLoss(0.25, 0.5), lambda x, t: sigmoid_focal_loss(x, t, 0.25, 0.5)),
    "cross entropy": (SigmoidFocalLoss(-1, 0), lambda x, t: sigmoid_focal_loss(x, t, -1, 0)),
    "focal star": (FocalStarLoss(), focal_star_loss),
    "hinge": (HingeLoss(), hinge_loss),
}
# One rounding of the dtype, and in fp32 the digits of the exponential and the logarithm. Below atol
# a dtype has fewer digits.
RTOL = {torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
ATOL = {torch.float32: 1e-12, torch.bfloat16: 1e-12, torch.float16: 6e-8}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def dense_case(
    dtype: torch.dtype, layout: torch.memory_format
) -> tuple[list[Tensor], list[Tensor], list[LevelTargets]]:
    """`random_case` of three images, with logits of which nobody can be more sure."""
    sizes = [(13, 17), (3, 2)]
    generator = torch.Generator().manual_seed(0)
    logits, labels, targets = random_case(generator, 3, 9, K, sizes, fraction=0.02)
    logits = [x - 4 for x in logits]
    for x in logits:
        x.view(-1)[:4] = torch.tensor([-60.0, 60.0, 0.0, -20.0])
    return [x.to(dtype).to(memory_format=layout) for x in logits], labels, targets


def on_device(target: LevelTargets) -> LevelTargets:
    positive, classes, ignored, _ = target
    places = [Places(*(index.to(DEVICE) for index in x)) for x in (positive, ignored)]
    return LevelTargets(places[0], classes.to(DEVICE), places[1])


def image_weights(logits: list[Tensor]) -> Tensor:
    return torch.linspace(0.5, 2.0, len(logits[0])) / 100


def dense(
    loss: DenseLoss, logits: list[Tensor], targets: list[LevelTargets], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Sum and scaled gradients of the device, on the host in fp64."""
    logits = [x.to(DEVICE).requires_grad_() for x in logits]
    weights, targets = image_weights(logits).to(DEVICE), [on_device(x) for x in targets]
    total = dense_loss_sum(loss, logits, targets, K, weights)
    gradients = torch.autograd.grad(total * scale, logits)
    assert all(g.stride() == x.stride() for g, x in zip(gradients, logits, strict=True))
    return total.detach().cpu().double(), [gradient.cpu().double() for gradient in gradients]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("name", LOSSES)
def test_the_dense_sum_and_its_gradient_equal_the_definition_in_fp64(name, dtype, layout):
    (loss, definition), scale = LOSSES[name], 64.0
    logits, labels, targets = dense_case(dtype, layout)
    total, gradients = dense(loss, logits, targets, scale)
    exact = [x.double().requires_grad_() for x in logits]
    expected = (definition_sum(exact, labels, K, definition) * image_weights(logits)).sum()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=0)
    expected_gradients = torch.autograd.grad(expected * scale, exact)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=RTOL[dtype], atol=ATOL[dtype] * scale)


@pytest.mark.parametrize("normalizer", [1.0, 100.0, 1000.0])
def test_a_loss_scale_keeps_the_gradient_of_fp16_logits(normalizer):
    """Unscaled, 63% of it rounds to 0 at 100 positives, and 99.8% at 1,000."""
    generator = torch.Generator().manual_seed(0)
    x = (0.3 * torch.randn(1, 9 * K, 25, 38, generator=generator) - 4.595).half()
    logits, scale = x.to(DEVICE).requires_grad_(), 65536.0
    weights = torch.tensor([1 / normalizer], device=DEVICE)
    total = dense_loss_sum(SigmoidFocalLoss(), [logits], [background(DEVICE)], K, weights)
    (gradient,) = torch.autograd.grad(total * scale, logits)
    exact = x.double().requires_grad_()
    loss = sigmoid_focal_loss(exact, torch.zeros_like(exact)).sum() / normalizer
    (expected,) = torch.autograd.grad(loss * scale, exact)
    assert (gradient.cpu().double() - expected).norm() < 1e-3 * expected.norm()


def background(device: str) -> LevelTargets:
    """A level without anything else."""
    empty = torch.empty(0, dtype=torch.int64, device=device)
    nothing = Places(empty, empty, empty, empty)
    return LevelTargets(nothing, empty, nothing)


@pytest.mark.parametrize("dtype", RTOL)
def test_the_kernels_equal_the_operations_that_they_take_the_place_of(monkeypatch, dtype):
    logits, _, targets = dense_case(dtype, torch.channels_last)
    fused = dense(SigmoidFocalLoss(), logits, targets, 8.0)
    monkeypatch.setattr(kernels, "available", lambda device: False)
    plain = dense(SigmoidFocalLoss(), logits, targets, 8.0)
    torch.testing.assert_close(fused[0], plain[0], rtol=2e-6, atol=0)
    for one, other in zip(fused[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, rtol=2 * RTOL[dtype], atol=8 * ATOL[dtype])


@only_gpu
def test_the_kernels_are_used():
    assert kernels.available(torch.device(DEVICE)) or torch.cuda.get_device_capability() < (8, 0)


def test_the_same_logits_give_the_same_bits():
    logits, _, targets = dense_case(torch.float32, torch.contiguous_format)
    one, other = (dense(SigmoidFocalLoss(), logits, targets, 1.0) for _ in range(2))
    assert torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


@only_gpu
def test_the_loss_takes_the_memory_of_its_gradient():
    logits = torch.randn(2, 9 * K, 100, 152, device=DEVICE).requires_grad_()
    weights = torch.ones(2, device=DEVICE)
    for _ in range(2):  # the first compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        total = dense_loss_sum(SigmoidFocalLoss(), [logits], [background(DEVICE)], K, weights)
        (gradient,) = torch.autograd.grad(total, logits)
        growth = torch.cuda.max_memory_allocated() - before
        del gradient, total
    assert growth < 1.1 * logits.nbytes


# Anchors and labels


@pytest.mark.parametrize("rule", ["detectron2", "detectron", "paper"])
@pytest.mark.parametrize("count", [1, 20, 700])
def test_labels_equal_those_of_the_cpu_to_the_last_bit(rule, count):
    """Half of the boxes come twice, and the first of equals is matched."""
    generator = torch.Generator().manual_seed(count)
    side = 8 * 40 ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([320.0, 256.0])
    boxes = torch.cat([corner, corner + side], 1)
    boxes[count // 2 :] = boxes[: count - count // 2].clone()
    no_area, outside, whole = [5, 5, 5, 5], [9000, 9000, 9010, 9010], [0, 0, 320, 256]
    odd = torch.tensor([no_area, outside, whole], dtype=torch.float32)
    gt_instances = [
        Instances((256, 320), gt_boxes=Boxes(x), gt_classes=torch.arange(len(x)) % 7)
        for x in (torch.cat([boxes, odd]), torch.zeros(0, 4), odd)
    ]
    anchors, assigner = retinanet_anchors(), Assigner(num_classes=7, rule=rule)
    expected, expected_idxs = assigner(anchors, gt_instances)
    labels, matched_idxs = assigner([level.to(DEVICE) for level in anchors], gt_instances)
    assert torch.equal(labels.cpu(), expected)
    positive = (expected >= 0) & (expected < 7)
    assert positive.any()
    assert torch.equal(matched_idxs.cpu()[positive], expected_idxs[positive])


def test_anchors_equal_those_of_the_cpu_to_the_last_bit():
    strides = (8, 16, 32, 64, 128)
    sizes = [(-(-800 // stride), -(-1216 // stride)) for stride in strides]
    on_cpu, found = (
        model(device=device).anchor_generator([torch.empty(1, 1, *x, device=device) for x in sizes])
        for device in ("cpu", DEVICE)
    )
    for one, other in zip(on_cpu, found, strict=True):
        assert torch.equal(one.tensor, other.tensor.cpu())


# The whole model


def model(names=PLUGIN, device=DEVICE, norm="BN", **keys: object) -> nn.Module:
    cfg = small_cfg(norm=norm, **names)
    if names is PLUGIN:
        add_retina_focal_config(cfg)
    keys = {"MODEL.DEVICE": device, **{f"MODEL.RETINA_FOCAL.{k}": v for k, v in keys.items()}}
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    torch.manual_seed(0)
    return build_model(cfg)


def pair() -> tuple[nn.Module, nn.Module]:
    """Stock and ours with the same weights."""
    stock, ours = model(STOCK), model()
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


def step(module: nn.Module, batch: list[dict]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses, and gradients on the host by name."""
    module.zero_grad()
    with EventStorage():
        losses = module(batch)
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}, gradients_of(module)


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name.removeprefix("module."): x.cpu() for name, x in found.items()}


def assert_near(found, expected, losses_rtol: float, gradients: float) -> None:
    """Losses each on its own; gradients by the norm of what they differ in."""
    assert found[0] == pytest.approx(expected[0], rel=losses_rtol)
    assert distance(expected[1], found[1]) < gradients


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    one, other = (torch.cat([x[name].flatten() for name in one]).double() for x in (one, other))
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_a_step_equals_that_of_the_cpu(norm):
    batch = pictures(SIZES, [5, 0])
    on_cpu, found = (step(model(device=x, norm=norm), batch) for x in ("cpu", DEVICE))
    assert_near(found, on_cpu, 1e-4, 1e-3)


def test_a_step_equals_stock():
    batch = pictures(SIZES, [6, 0])
    stock, ours = (step(x, batch) for x in pair())
    assert_near(ours, stock, 1e-5, 1e-3)


def test_detections_equal_stock():
    stock, ours = pair()
    batch = pictures(SIZES, [6, 2])
    results = []
    for module in (stock.eval(), ours.eval()):
        with torch.no_grad():
            # Scores that differ, as those of a trained model do.
            features = stock.backbone(stock.preprocess_image(batch).tensor)
            logits, _ = stock.head([features[name] for name in stock.head_in_features])
            module.head.cls_score.weight /= logits[0].std().clamp(min=1 / 30)
            module.test_score_thresh = 0.0
            results.append([x["instances"].to("cpu") for x in module(batch)])
            module.head.cls_score.weight *= logits[0].std().clamp(min=1 / 30)
    for theirs, mine in zip(*results, strict=True):
        assert len(theirs) == len(mine) > 20
        torch.testing.assert_close(mine.scores, theirs.scores, rtol=0, atol=1e-5)


def test_postprocessing_equals_that_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    anchors = [level.tensor for level in retinanet_anchors(96, 128)]
    cells = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    logits = [torch.randn(2, 9 * 3, *size, generator=generator) - 3 for size in cells]
    deltas = [0.1 * torch.randn(2, 9 * 4, *size, generator=generator) for size in cells]
    postprocessor = Postprocessor(num_classes=3, box2box_transform=Box2BoxTransform((1.0,) * 4))
    on_cpu, found = (
        postprocessor(
            [Boxes(x.to(device)) for x in anchors],
            [x.to(device) for x in logits],
            [x.to(device) for x in deltas],
            SIZES,
        )
        for device in ("cpu", DEVICE)
    )
    for one, other in zip(on_cpu, found, strict=True):
        assert len(one) == len(other) > 20
        torch.testing.assert_close(other.scores.cpu(), one.scores, rtol=0, atol=1e-6)
        boxes = other.pred_boxes.tensor.cpu(), one.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=0, atol=1e-3)


def test_proposals_of_a_two_stage_model_train_as_on_the_cpu():
    batch, seen = pictures(SIZES, [5, 2]), []
    for device in ("cpu", DEVICE):
        cfg = faster_rcnn_cfg()
        cfg.MODEL.DEVICE = device
        torch.manual_seed(0)
        module = build_model(cfg).train()
        with EventStorage():  # the other losses sample their boxes by chance
            losses = {k: x for k, x in module(batch).items() if k.startswith("loss_rpn")}
        sum(losses.values()).backward()
        seen.append(({k: x.item() for k, x in losses.items()}, gradients_of(module)))
    on_cpu, found = seen
    assert len(found[0]) == 2
    assert_near(found, on_cpu, 1e-4, 1e-3)


@only_gpu
def test_the_box_tower_runs_on_whole_maps():
    module, seen = model(), []
    module.criterion.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    step(module, pictures(SIZES, [3, 2]))
    assert not isinstance(seen[0], PendingDeltas)


def test_folded_weights_follow_the_model_to_another_device():
    module, image = model(device="cpu", norm="FrozenBN").eval(), pictures(SIZES[:1], [1])
    module.test_score_thresh = 0.0
    with torch.no_grad():
        before = module(image)[0]["instances"]
        after = module.to(DEVICE)(image)[0]["instances"].to("cpu")
    assert len(before) == len(after) > 20
    torch.testing.assert_close(after.scores[:20], before.scores[:20], rtol=0, atol=1e-4)


def logits_of(module: nn.Module, batch: list[dict]) -> list[Tensor]:
    """What the criterion is given."""
    seen = []
    module.criterion.register_forward_pre_hook(lambda _, args: seen.extend(args[1]))
    with EventStorage():
        module(batch)
    return seen


@pytest.mark.parametrize("precision", ["bf16", "auto"])
@only_gpu
def test_bf16_computes_in_bf16_and_channels_last(precision):
    batch = pictures(SIZES, [3, 2])
    module = model(PRECISION=precision)
    seen = logits_of(module, batch)
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    full, found = step(model(), batch)[0], step(module, batch)[0]
    assert found == pytest.approx(full, rel=0.05)


@only_gpu
def test_fp32_computes_in_channels_last_too():
    """With weights in it: cuDNN would transpose them at every step."""
    module = model()
    seen = logits_of(module, pictures(SIZES, [3, 2]))
    weights = [x for x in module.parameters() if x.dim() == 4]
    for x in (*seen, *weights):
        assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)


@only_gpu
def test_amp_computes_in_channels_last_too():
    """SOLVER.AMP opens its autocast outside. cuDNN would transpose maps of the other layout."""
    with torch.autocast("cuda", torch.float16):
        seen = logits_of(model(), pictures(SIZES, [3, 2]))
    assert {x.dtype for x in seen} == {torch.float16}
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@only_gpu
def test_gradients_of_amp_are_those_of_fp32_up_to_rounding():
    batch, module = pictures(SIZES, [5, 3]), model(norm="GN")
    _, full = step(model(norm="GN"), batch)
    with torch.autocast("cuda", torch.float16), EventStorage():
        losses = module(batch)
    (sum(losses.values()) * 1024.0).backward()
    half = {name: x.double() / 1024 for name, x in gradients_of(module).items()}
    for name in ("head.cls_score.bias", "head.bbox_pred.weight", "backbone.fpn_lateral3.weight"):
        one, other = full[name].double().flatten(), half[name].flatten()
        assert torch.cosine_similarity(one, other, dim=0) > 0.99, name


@only_gpu
def test_amp_trains_and_keeps_its_scale():
    module, batch = model(norm="GN"), pictures(SIZES, [5, 3])
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    trainer = StepTrainer(
        module, iter([batch] * 6), optimizer, grad_scaler=torch.amp.GradScaler("cuda")
    )
    trainer.iter = 0
    with EventStorage() as storage:
        for _ in range(6):
            trainer.run_step()
            storage.step()
        losses = [value for value, _ in storage.history("total_loss").values()]
    assert losses[-1] < losses[0] and trainer.grad_scaler.get_scale() >= 2**12


@only_gpu
@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_in_cuda_graphs_equals_a_plain_one(precision, norm):
    """Also the second and third, which replay, and after the weights have changed."""
    plain, graphed = (
        model(norm=norm, PRECISION=precision, CUDA_GRAPHS=graphs) for graphs in (False, True)
    )
    for boxes in ([5, 3], [0, 1], [2, 7]):
        batch = pictures([SIZES[0]] * 2, boxes)
        expected, found = (step(module, batch) for module in (plain, graphed))
        assert_near(found, expected, 1e-3, 1e-2)
        for module in (plain, graphed):
            with torch.no_grad():
                for parameter in filter(lambda x: x.requires_grad, module.parameters()):
                    parameter.mul_(0.99)  # a frozen one would be captured anew


@pytest.mark.parametrize("count", [1, 2])
def test_micro_batches_give_the_gradient_of_the_batch(count):
    batch = pictures([SIZES[0]] * 4, [5, 0, 3, 9])
    whole = model(norm="GN", NORMALIZER="batch")
    parts = copy.deepcopy(whole)
    _, expected = step(whole, batch)
    with EventStorage():
        accumulate_gradients(parts, batch, count, Tensor.backward)
    assert distance(expected, gradients_of(parts)) < 1e-4
    assert whole.count_positives(batch).device.type == torch.device(DEVICE).type


@pytest.mark.parametrize("key", ["OHEM.ENABLED", "ALPHA_FROM_DATA"])
def test_choices_of_the_paper_equal_those_of_the_cpu(key):
    batch = pictures(SIZES, [5, 2])
    on_cpu, found = (
        step(model(device=x, norm="GN", **{key: True}), batch)[0] for x in ("cpu", DEVICE)
    )
    assert found == pytest.approx(on_cpu, rel=1e-3)


# Waits and copies


def training(module: nn.Module, batch: list[dict]) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad()
        sum(module(batch).values()).backward()

    return run


def inference(module: nn.Module, batch: list[dict]) -> Callable[[], None]:
    module.eval().test_score_thresh = 0.005
    return torch.no_grad()(lambda: module(batch))


def counted(make: Callable, batch: list[dict], folder: Path) -> tuple[list[str], int]:
    """Where the host waits, and the bytes copied to the device; a CPU pretends to be one."""
    if not ON_GPU:
        run = make(pretend.to_device(model()), batch)
        with pretend.Counting() as counting:
            run()
        return list(counting.waits.elements()), sum(x.num_bytes for x in counting.copies)
    run = make(model(), batch)
    run()  # what a first call compiles or keeps
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # set_sync_debug_mode itself warns that it is a prototype.
    called = [x for x in found if "called a synchronizing" in str(x.message)]
    waits = [f"{x.filename}:{x.lineno}" for x in called]
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    copies = [x for x in events if x.get("name", "").startswith("Memcpy HtoD")]
    return waits, sum(x["args"]["bytes"] for x in copies)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    ("make", "most"), [(training, TRAINING_WAITS), (inference, INFERENCE_WAITS)]
)
def test_the_host_waits_as_often_whatever_the_batch_and_copies_bytes(make, most, count, tmp_path):
    batch = pictures([SIZES[0]] * count, [5] * count)
    waits, copied = counted(make, batch, tmp_path)
    assert len(waits) <= most, waits
    # What else crosses are boxes, classes and sizes; as fp32 the images would be four times that.
    images = sum(record["image"].nbytes for record in batch)
    assert images <= copied < 1.1 * images


# Processes


@closed_process_group()
def one_of_two(rank: int, folder: str) -> None:
    """Saves the gradients of a step on one image of two."""
    store = Path(folder, "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    torch.backends.cudnn.allow_tf32 = False
    batch = pictures(SIZES[:1] * 2, [5, 0])
    module = distribute(model(norm="GN", NORMALIZER="global"))
    torch.save(step(module, batch[rank : rank + 1]), Path(folder, f"{rank}.pth"))


@closed_process_group()
def alone_over_nccl(rank: int, folder: str) -> None:
    """What nccl makes of the gradients, and of the normaliser of what is said to be two."""
    store = Path(folder, "store")
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    torch.backends.cudnn.allow_tf32 = False
    module = DistributedDataParallel(model(norm="GN", NORMALIZER="batch"))
    seen = step(module, pictures(SIZES[:1] * 2, [5, 0]))
    counts = torch.tensor([3, 4], device=DEVICE)
    with mock.patch.object(comm, "get_world_size", lambda: 2):
        normalizers = NORMALIZER_REGISTRY.get("global")(counts, None)
    torch.save((*seen, normalizers.cpu()), Path(folder, "seen.pth"))


@slow_on_cpu
def test_two_processes_on_one_device_give_what_one_gives(tmp_path):
    """Over gloo, since nccl refuses two processes on one GPU."""
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    (_, first), (_, second) = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    _, expected = step(model(norm="GN", NORMALIZER="global"), pictures(SIZES[:1] * 2, [5, 0]))
    assert distance(expected, first) < 1e-4


@only_gpu
def test_nccl_reduces_gradients_and_the_normaliser(tmp_path):
    """One process alone: nccl refuses two on one GPU."""
    torch.multiprocessing.spawn(alone_over_nccl, (str(tmp_path),), nprocs=1)
    *seen, normalizers = torch.load(tmp_path / "seen.pth")
    batch = pictures(SIZES[:1] * 2, [5, 0])
    assert_near(seen, step(model(norm="GN", NORMALIZER="batch"), batch), 1e-4, 1e-4)
    assert normalizers.tolist() == [3.5, 3.5]  # of 7 positives over two processes
