"""Anchors of other projects are theirs to the last bit."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from retina_focal.other_anchors import DetectronAnchorGenerator, TorchvisionAnchorGenerator

# What Detectron's generate_anchors.py makes at stride 16, as its comment lists it, numbered from 1.
DETECTRON = """
 -83  -39 100  56   -175  -87 192 104   -359 -183 376 200
 -55  -55  72  72   -119 -119 136 136   -247 -247 264 264
 -35  -79  52  96    -79 -167  96 184   -167 -343 184 360
"""


@pytest.mark.parametrize("steps", [(1, 1), (12, 17)])
def test_torchvisions_anchors_are_those_of_its_generator_to_the_last_bit(steps):
    padded_size = 32 * steps[0] * 3, 32 * steps[1] + 64
    features = [torch.zeros(1, 1, *(-(-x // 2**i) for x in padded_size)) for i in range(3, 8)]
    sizes = tuple(
        (x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512)
    )
    theirs = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    images = ImageList(torch.zeros(1, 3, *padded_size), [padded_size])
    levels = theirs(images, features)[0].split([9 * x.shape[-2] * x.shape[-1] for x in features])
    ours = TorchvisionAnchorGenerator(
        base_sizes=[32, 64, 128, 256, 512],
        scales_per_octave=3,
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=[8, 16, 32, 64, 128],
    )
    for own, level in zip(ours(features), levels, strict=True):
        by_ratio = level.view(-1, 3, 3, 4)
        assert torch.equal(own.tensor, by_ratio.transpose(1, 2).reshape(-1, 4))

    class Traced(nn.Module):
        def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.tensor for x in ours(list(features)))

    other = [torch.zeros(1, 1, 2 ** (7 - i) * 2, 2 ** (7 - i) * 3) for i in range(3, 8)]
    with torch.no_grad():
        traced = torch.jit.trace(Traced(), tuple(other), check_trace=False)
    for own, level in zip(traced(*features), ours(features), strict=True):
        assert torch.equal(own, level.tensor)


def test_detectrons_anchors_are_its_published_table():
    generator = DetectronAnchorGenerator(
        base_sizes=[128, 256, 512],
        scales_per_octave=1,
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=[16],
        offset=0.5,
    )
    table = torch.tensor(list(map(float, DETECTRON.split()))).view(3, 3, 4) - 1
    expected = table + torch.tensor([0, 0, 1, 1])  # from the first pixel to the end of the last
    (found,) = generator([torch.zeros(1, 1, 1, 1)])
    assert torch.equal(found.tensor.view(3, 3, 4), expected.transpose(0, 1))
