"""RetinaNet and the focal loss (arXiv:1708.02002) as a detectron2 plugin.

Importing the package registers its names in detectron2's registries, and does nothing else.
"""

import warnings

try:
    # detectron2's and torch's own deprecations, which no user of this package can mend.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deprecated")
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":  # it is there, and lacks something itself
        raise
    raise ImportError(
        "retina_focal needs detectron2, which is not installed. Build it from source "
        "(https://github.com/facebookresearch/detectron2), or install its Python part from PyPI:\n"
        "  pip install --no-deps --target $(python -c "
        "'import sysconfig; print(sysconfig.get_path(\"purelib\"))') "
        "--python-version 3.10 --implementation cp --abi none --only-binary=:all: "
        "sal-detectron2==0.7.2"
    ) from error

from retina_focal.anchors import OctaveAnchorGenerator
from retina_focal.assigner import ASSIGNER_REGISTRY, Assigner
from retina_focal.atss import ATSSAssigner
from retina_focal.backbone import (
    build_retina_focal_resnet_fpn_backbone,
    build_retina_focal_resnet_single_backbone,
    build_retina_focal_timm_fpn_backbone,
)
from retina_focal.config import add_retina_focal_config, get_cfg
from retina_focal.criterion import Criterion
from retina_focal.data.registration import (
    register_coco_json,
    register_datasets,
)
from retina_focal.head import DENSE_HEAD_REGISTRY, FocalRetinaNetHead
from retina_focal.later_losses import (
    AsymmetricLoss,
    Poly1FocalLoss,
    QualityFocalLoss,
    VarifocalLoss,
)
from retina_focal.losses import (
    CLS_LOSS_REGISTRY,
    FocalStarLoss,
    HingeLoss,
    SigmoidFocalLoss,
    focal_star_loss,
    hinge_loss,
    sigmoid_focal_loss,
)
from retina_focal.normalizers import NORMALIZER_REGISTRY
from retina_focal.other_anchors import DetectronAnchorGenerator, TorchvisionAnchorGenerator
from retina_focal.postprocess import Postprocessor
from retina_focal.proposals import FocalRPN, FocalRPNHead
from retina_focal.retinanet import FocalRetinaNet
from retina_focal.sampling import HardExampleSampler
from retina_focal.training.accumulation import accumulate_gradients
from retina_focal.training.assembly import Trainer

__all__ = [
    "ASSIGNER_REGISTRY",
    "CLS_LOSS_REGISTRY",
    "DENSE_HEAD_REGISTRY",
    "NORMALIZER_REGISTRY",
    "ATSSAssigner",
    "Assigner",
    "AsymmetricLoss",
    "Criterion",
    "DetectronAnchorGenerator",
    "FocalRPN",
    "FocalRPNHead",
    "FocalRetinaNet",
    "FocalRetinaNetHead",
    "FocalStarLoss",
    "HardExampleSampler",
    "HingeLoss",
    "OctaveAnchorGenerator",
    "Poly1FocalLoss",
    "Postprocessor",
    "QualityFocalLoss",
    "SigmoidFocalLoss",
    "TorchvisionAnchorGenerator",
    "Trainer",
    "VarifocalLoss",
    "accumulate_gradients",
    "add_retina_focal_config",
    "build_retina_focal_resnet_fpn_backbone",
    "build_retina_focal_resnet_single_backbone",
    "build_retina_focal_timm_fpn_backbone",
    "focal_star_loss",
    "get_cfg",
    "hinge_loss",
    "register_coco_json",
    "register_datasets",
    "sigmoid_focal_loss",
]
