"""A detector of two convolutions, whose export takes seconds, and pictures on which it detects."""

import torch
from conftest import pictures
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from retina_focal import get_cfg
from retina_focal.export.metadata import Metadata

CLASSES = ("a", "b", "c")


@BACKBONE_REGISTRY.register()
class TwoConvolutions(Backbone):
    """Levels of stride 8 and 32, so that an export takes seconds."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 9, stride=8, padding=4)
        self.second = nn.Conv2d(16, 16, 3, stride=4, padding=1)

    @property
    def size_divisibility(self):
        return 32

    def output_shape(self):
        return {"p3": ShapeSpec(16, stride=8), "p5": ShapeSpec(16, stride=32)}

    def forward(self, images):
        p3 = self.first(images).relu()
        return {"p3": p3, "p5": self.second(p3).relu()}


def tiny_cfg(**keys):
    cfg = get_cfg()
    keys = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.RETINANET.NUM_CLASSES": 3,
        "MODEL.META_ARCHITECTURE": "FocalRetinaNet",
        "MODEL.BACKBONE.NAME": "TwoConvolutions",
        "MODEL.ANCHOR_GENERATOR.NAME": "OctaveAnchorGenerator",
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.RETINA_FOCAL.ANCHORS.BASE_SIZES": [24, 64],
        "MODEL.RETINANET.IN_FEATURES": ["p3", "p5"],
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.02,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 200,
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 128,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    return cfg


def tiny_model(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        model.head.cls_score.weight.normal_(0, 0.01)
        model.head.bbox_pred.weight.normal_(0, 0.001)
        for part in (model.head.cls_subnet, model.head.bbox_subnet):
            part[0].weight.normal_(0, 0.1)
    return model


def metadata_of(cfg, tmp_path, **flags):
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    return Metadata.of_run(cfg, CLASSES, weights, **flags)


def noise(count, size, seed=0):
    return [x["image"] for x in pictures([size] * count, [4] * count, seed=seed)]
