"""The losses on ``DATA.VAL``, beside every evaluation, by ``TRAIN.VAL_LOSS``."""

from collections.abc import Iterable

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor, nn

from retina_focal.config import retina_focal_node
from retina_focal.data.classes import match_classes
from retina_focal.data.images import naming
from retina_focal.data.regions import keeping_regions
from retina_focal.data.registration import check_datasets, register_datasets
from retina_focal.data.resizing import mapper_with_boxes
from retina_focal.errors import UserError
from retina_focal.retinanet import FocalRetinaNet
from retina_focal.training.average import averaged_weights
from retina_focal.training.resume import FollowsEvaluation
from retina_focal.training.signals import StoppableLoader
from retina_focal.training.values import plain_values

NAMES = ("loss_cls", "loss_box_reg")


class ValidationLoss(FollowsEvaluation):
    """Puts ``val/loss_cls``, ``val/loss_box_reg`` and their sum ``val/total_loss`` in the metrics.

    Each is the sum over all images of the dataset, divided by its positive anchors, at least 1. So
    it does not depend on batches, processes or the normaliser of the training. The model
    is in eval mode, with the average of the weights where there is one. It stands behind the hook
    that evaluates, in every process.
    """

    def __init__(self, loader: Iterable[list[dict]]):
        """
        Args:
            loader: a process's part of the dataset, with `instances`.
        """
        self.loader, self.measured = loader, -1

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.evaluated == trainer.iter != self.measured:
            self._measure()

    def after_train(self) -> None:
        self.after_step()

    def _measure(self) -> None:
        trainer = self.trainer
        self.measured = trainer.iter
        model = trainer.checkpointer.model
        with averaged_weights(trainer.average):
            sums = validation_sums(model, self.loader)
        *losses, positives = torch.stack(comm.all_gather(sums)).sum(0).tolist()
        values = [loss / max(positives, 1) for loss in losses]
        for name, value in zip((*NAMES, "total_loss"), (*values, sum(values)), strict=True):
            trainer.storage.put_scalar(f"val/{name}", value, smoothing_hint=False)


@torch.no_grad()
def validation_sums(model: FocalRetinaNet, loader: Iterable[list[dict]]) -> Tensor:
    """(3,) fp64: the sums of both losses, and the number of positive anchors.

    The model is left as it was, and nothing is exchanged with other processes. A batch with a
    normaliser of 1 gives its sums.
    """
    sums, was_training, graphed = torch.zeros(3, dtype=torch.float64), model.training, model.graphed
    model.eval()
    # The model alone, so that it returns losses; its parts stay in eval mode.
    model.training, model.graphed = True, None
    try:
        with EventStorage():  # what the forwards log is not of the training
            for batch in loader:
                losses = model(batch, torch.ones(len(batch), device=model.device))
                values = [*(losses[name] for name in NAMES), model.count_positives(batch).sum()]
                sums += torch.stack([x.double().cpu() for x in values])
    finally:
        model.train(was_training)
        model.graphed = graphed
    return sums


def validation_loss(parts: CfgNode | DictConfig, model: nn.Module) -> ValidationLoss | None:
    """What ``MODEL.RETINA_FOCAL.TRAIN.VAL_LOSS`` asks for.

    Args:
        parts: the config of either kind.
        model: not distributed.
    Raises:
        UserError: there is no dataset for it, or the model has no losses that can be added up.
    """
    cfg = plain_values(parts)
    node = retina_focal_node(cfg)
    name = node.DATA.VAL
    if not node.TRAIN.VAL_LOSS:
        return None
    reason = None
    if not name:
        reason = "no dataset is named for it; add: MODEL.RETINA_FOCAL.DATA.VAL NAME"
    elif not isinstance(model, FocalRetinaNet):
        reason = f"the model is a {type(model).__name__}; it needs a FocalRetinaNet"
    elif model.criterion.sampler is not None or model.criterion.alpha_from_data:
        reason = "OHEM and ALPHA_FROM_DATA weigh each batch by itself; turn them off"
    if reason:
        raise UserError(f"MODEL.RETINA_FOCAL.TRAIN.VAL_LOSS is True, but {reason}")
    register_datasets(cfg, (name,))
    check_datasets((name,))
    match_classes((*cfg.DATASETS.TRAIN, name))
    if isinstance(parts, DictConfig):
        mapper = instantiate(parts.dataloader.test.mapper)
        mapper.is_train = True  # with the transforms of the test, and the boxes
    else:
        mapper = mapper_with_boxes(cfg)
    if node.DATA.IGNORE_REGIONS:
        mapper = keeping_regions(mapper)
    loader = build_detection_test_loader(
        get_detection_dataset_dicts((name,), filter_empty=False),
        mapper=naming(mapper, node.DATA.MAX_PIXELS),
    )
    return ValidationLoss(StoppableLoader(loader, node.TRAIN.TIMEOUT))
