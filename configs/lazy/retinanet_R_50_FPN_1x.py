"""The model of COCO-Detection/retinanet_R_50_FPN_1x.yaml; all else is detectron2's LazyConfig.

python tools/lazyconfig_train_net.py --config-file <this file> --num-gpus 8
with detectron2's tools/; see the YAML for hardware, time and AP. Not run.
"""

from detectron2 import model_zoo

from .model import model

_stock = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader = _stock.dataloader
optimizer = _stock.optimizer
lr_multiplier = _stock.lr_multiplier
train = _stock.train
