"""As COCO-Detection/retinanet_R_50_FPN_paper_600.yaml; see its base for the reasons. Not run.

The paper's other scales are two overrides; testing follows training:
  dataloader.train.mapper.augmentations.0.short_edge_length=800
  dataloader.train.mapper.augmentations.0.max_size=1333
"""

from .retinanet_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.assigner.rule = "paper"
model.criterion.normalizer = "image"
model.criterion.smooth_l1_beta = 0.11

_resize = dataloader.train.mapper.augmentations[0]
_resize.short_edge_length = [600]
_resize.max_size = 1000
dataloader.test.mapper.augmentations[0].update(
    short_edge_length="${dataloader.train.mapper.augmentations[0].short_edge_length}",
    max_size="${dataloader.train.mapper.augmentations[0].max_size}",
    sample_style="choice",
)

lr_multiplier.warmup_length = 500 / 90000
lr_multiplier.warmup_factor = 1 / 3
