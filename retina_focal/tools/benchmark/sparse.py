"""Exports that compute boxes where detections may be, on a picture with objects.

What they gain depends on how many cells that is, so random logits say nothing: here the candidates
lie on objects.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from retina_focal.candidates import logit
from retina_focal.export.onnx_format import write_onnx
from retina_focal.export.openvino_format import to_openvino
from retina_focal.export.runners import open_exported
from retina_focal.tools.benchmark.exports import (
    STOCK,
    Prepared,
    metadata_of,
    optional_models,
    with_weights,
)
from retina_focal.tools.benchmark.inputs import pictures
from retina_focal.tools.benchmark.instruments import after_head
from retina_focal.tools.benchmark.models import Setting, build, calibrate

GREY = 128
# Pairs of an anchor and a class above the threshold.
CANDIDATES_PER_OBJECT = 30


def prepare_sparse(setting: Setting, folder: Path) -> Prepared:
    """Stock, ours, and exports with whole maps of boxes and with sparse ones."""
    batch = [{"image": _objects(x)} for x in pictures(setting)]
    stock = _detecting(setting, batch)
    ours, metadata = with_weights(setting, "fp32", stock), metadata_of(setting, folder)

    def onnx(sparse_boxes: bool) -> nn.Module:
        path = folder / f"sparse_{sparse_boxes}" / "model.onnx"
        path.parent.mkdir()
        write_onnx(ours, metadata, path, sparse_boxes)
        return open_exported(path)

    def openvino(sparse_boxes: bool) -> nn.Module:
        output = folder / f"sparse_{sparse_boxes}"
        return open_exported(to_openvino(output / "model.onnx", output / "fp32", "fp32", metadata))

    makers = {
        f"{runtime}, {boxes}": lambda make=make, sparse=sparse: make(sparse)
        for runtime, make in (("onnxruntime, fp32", onnx), ("OpenVINO, fp32", openvino))
        for boxes, sparse in (("whole maps", False), ("sparse boxes", True))
    }
    prepared = Prepared(batch, {STOCK: stock, "ours, eager, fp32": ours}, {})
    optional_models(makers, prepared)
    return prepared


def _objects(record: dict) -> Tensor:
    """The picture's boxes on grey."""
    image = torch.full_like(record["image"], GREY)
    for x0, y0, x1, y1 in record["instances"].gt_boxes.tensor.round().int().tolist():
        image[:, y0:y1, x0:x1] = record["image"][:, y0:y1, x0:x1]
    return image


@torch.no_grad()
def _detecting(setting: Setting, batch: list[dict]) -> nn.Module:
    """Stock with random weights, whose candidates lie on the objects."""
    model = calibrate(build("stock", setting))
    grey = _logits(model, [{"image": torch.full_like(x["image"], GREY)} for x in batch])
    score = model.head.cls_score
    score.bias.sub_(torch.stack([x.amax((0, 2, 3)) for x in grey]).amax(0))
    logits = torch.cat([x.flatten() for x in _logits(model, batch)])
    count = CANDIDATES_PER_OBJECT * setting.boxes * setting.batch
    highest, factor = logits.topk(count).values[-1], 1 / logits.std()
    threshold = logit(setting.cfg.MODEL.RETINANET.SCORE_THRESH_TEST)
    score.weight.mul_(factor)
    score.bias.sub_(highest).mul_(factor).add_(threshold)
    return model


def _logits(model: nn.Module, batch: list[dict]) -> list[Tensor]:
    """(N, A x K, Hi, Wi) per level."""
    heads: list[tuple] = []
    with after_head(model, heads.append):
        model(batch)
    return heads[0][0]
