"""The trainer: detectron2's, able to run several processes without a GPU."""

import ctypes
import logging
import os
import platform
import weakref
from collections.abc import Callable
from functools import partial

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from retina_focal.accumulation import AccumulatingAMPTrainer, AccumulatingTrainer
from retina_focal.config import retina_focal_node
from retina_focal.first_step import FirstStepCheck

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """`DefaultTrainer` that evaluates by the data set's type, with gloo processes on a CPU."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a config that `register_datasets` has seen.
        Raises:
            ValueError: SyncBN on a CPU with several processes, or micro-batches that do not fit.
        """
        # Not DefaultTrainer.__init__: it gives DDP a device number, which a CPU model refuses.
        TrainerBase.__init__(self)
        for name in ("detectron2", "retina_focal"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(name=name)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        training_steps = _training_steps(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self._trainer = training_steps(distribute(model), data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @property
    def results(self) -> dict:
        """Of the last evaluation: {"bbox": {"AP": ..., "AP50": ...}}; empty before the first."""
        return getattr(self, "_last_eval_results", {})

    def build_hooks(self) -> list[HookBase]:
        return [*super().build_hooks(), FirstStepCheck(self.cfg.DATASETS.TRAIN)]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of the data set's `evaluator_type`; writes to ``OUTPUT_DIR/inference``."""
        evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        if evaluator_type == "coco":
            return COCOEvaluator(dataset_name, output_dir=output_dir)
        if evaluator_type == "lvis":
            return LVISEvaluator(dataset_name, output_dir=output_dir)
        if evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise ValueError(
            f"data set '{dataset_name}' has evaluator_type {evaluator_type!r}; expected coco, lvis "
            "or pascal_voc: set it by MetadataCatalog.get(name).evaluator_type, or register the "
            "data set with --dataset NAME JSON IMAGES"
        )


def _training_steps(cfg: CfgNode) -> Callable[..., SimpleTrainer]:
    """What makes the object that runs the steps, from model, data loader and optimizer."""
    num_micro_batches = retina_focal_node(cfg).ACCUMULATE_STEPS
    if num_micro_batches == 1:
        return AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
    images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    if num_micro_batches < 1 or images % num_micro_batches:
        raise ValueError(
            f"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS is {num_micro_batches}, but a process has "
            f"{images} images a step (SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}, processes "
            f"{comm.get_world_size()}); set ACCUMULATE_STEPS to a divisor of {images}"
        )
    if cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet":
        raise ValueError(
            f"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS is {num_micro_batches}, but "
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} cannot count its positives "
            "beforehand; set ACCUMULATE_STEPS 1 or META_ARCHITECTURE FocalRetinaNet"
        )
    ours = retina_focal_node(cfg)
    if ours.OHEM.ENABLED or ours.ALPHA_FROM_DATA:
        raise ValueError(
            f"MODEL.RETINA_FOCAL.ACCUMULATE_STEPS is {num_micro_batches}, but OHEM.ENABLED "
            f"({ours.OHEM.ENABLED}) and ALPHA_FROM_DATA ({ours.ALPHA_FROM_DATA}) weigh by numbers "
            "of the whole batch, which a micro-batch lacks; set ACCUMULATE_STEPS 1 or both False"
        )
    steps = AccumulatingAMPTrainer if cfg.SOLVER.AMP.ENABLED else AccumulatingTrainer
    return partial(steps, num_micro_batches=num_micro_batches)


def distribute(model: nn.Module, **ddp_options: bool) -> nn.Module:
    """`model` in DistributedDataParallel where there are several processes, on a GPU or a CPU.

    Raises:
        ValueError: SyncBN on a CPU, which torch does not have.
    """
    if comm.get_world_size() == 1:
        return model
    options = {"broadcast_buffers": False, **ddp_options}
    if next(model.parameters()).device.type == "cpu":
        if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise ValueError(
                "the model has SyncBN, which torch has only for GPUs, and runs on the CPU in "
                f"{comm.get_world_size()} processes; use GN: MODEL.RETINANET.NORM GN"
            )
        options["device_ids"] = None
    return create_ddp_model(model, **options)


def available_device(device: str) -> str:
    """`device`, or "cpu", said in a line, where that is a GPU and the machine has none."""
    if not device.startswith("cuda") or torch.cuda.is_available():
        return device
    if comm.is_main_process():
        logger.warning("no GPU was found; running on the CPU instead of '%s'", device)
    return "cpu"


def share_cores(num_local_processes: int) -> None:
    """Give each of this machine's processes its part of the cores for CPU arithmetic.

    torch takes all cores in every process, and they get into each other's way. OMP_NUM_THREADS,
    where it is set, is the user's own choice for each process and stays.
    """
    if num_local_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_local_processes))


def keep_freed_memory() -> None:
    """Let this process keep the memory of one training step on the CPU for the next.

    glibc gives freed maps above 32 MB, and the end of its heap, back to the system after each
    step; fresh pages then take up to a tenth of the next. Settings of the environment (MALLOC_...,
    GLIBC_TUNABLES) are the user's own choice and stay.
    """
    chosen = [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc" or chosen:
        return
    libc = ctypes.CDLL(None)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(parameter, 2**31 - 1)
