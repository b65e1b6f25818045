"""As COCO-Detection/retinanet_R_101_FPN_paper_800_jitter.yaml. Not run."""

from .retinanet_R_101_FPN_paper_600 import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.mapper.augmentations[0].short_edge_length = [640, 672, 704, 736, 768, 800]
dataloader.train.mapper.augmentations[0].max_size = 1333
dataloader.test.mapper.augmentations[0].short_edge_length = [800]

lr_multiplier.scheduler.milestones = [90000, 120000, 135000]
lr_multiplier.warmup_length = 500 / 135000
train.max_iter = 135000
