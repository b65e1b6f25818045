"""As COCO-Detection/retinanet_R_50_FPN_3x.yaml. Not run."""

from detectron2 import model_zoo

from .retinanet_R_50_FPN_1x import dataloader, model, optimizer, train

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
train.max_iter = 270000
