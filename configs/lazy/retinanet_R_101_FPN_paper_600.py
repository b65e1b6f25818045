"""As COCO-Detection/retinanet_R_101_FPN_paper_600.yaml. Not run.

For the paper's other scales see retinanet_R_50_FPN_paper_600.py.
"""

from .retinanet_R_50_FPN_paper_600 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
