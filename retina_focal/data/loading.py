"""The training's data loader: a batch is a function of (seed, iteration)."""

import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import _train_loader_from_config
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from detectron2.utils.serialize import PicklableWrapper
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset

from retina_focal.config import get_cfg, retina_focal_node
from retina_focal.data.augmentation import Mosaic, add_augmentations, refuse_for_lazy
from retina_focal.data.box_mapper import BoxMapper
from retina_focal.data.existence import expect_pictures
from retina_focal.data.image_cache import CachedMapper, plan_cache
from retina_focal.data.images import MAX_PIXELS, BadPicture, naming
from retina_focal.data.regions import keeping_regions
from retina_focal.data.sampler import BatchSampler, seeded
from retina_focal.errors import UserError

# How many images are tried for one place of a batch before the training stops.
MAX_REPLACEMENTS = 100
# What is drawn, beside the seed and the position.
ORDER, SAMPLE = 0, 1

logger = logging.getLogger(__name__)


class TrainLoader:
    """As detectron2's loader, and the same batches from any `first_batch` on.

    Neither the number of workers nor that of processes, nor what else draws random numbers, changes
    what a step sees.
    """

    def __init__(
        self,
        dataset: list[dict] | Dataset,
        *,
        seed: int,
        mapper: Callable[[dict], dict],
        sampler: TrainingSampler,
        total_batch_size: int,
        aspect_ratio_grouping: bool = True,
        collate_fn: Callable[[list[dict]], object] | None = None,
        max_pixels: int = MAX_PIXELS,
        mosaic: Mosaic | None = None,
        cache_images: bool = False,
        **options: object,
    ):
        """
        Args:
            dataset: records, with "width" and "height" where images are grouped.
            seed: not negative.
            mapper: makes a record the model's input; it may draw random numbers, and returns None
                where another image shall be taken.
            sampler: of detectron2.
            total_batch_size: images of all processes.
            aspect_ratio_grouping: a batch has either wide images or others.
            collate_fn: default: a batch is a list of what `mapper` returns.
            max_pixels: of the largest picture that is decoded.
            mosaic: makes one sample of four.
            cache_images: pictures are kept in memory, once they are read.
            options: of torch's `DataLoader`, such as `num_workers`.
        Raises:
            UserError: the images can't be shared among the processes.
        """
        if total_batch_size < 1 or total_batch_size % comm.get_world_size():
            raise UserError(
                f"SOLVER.IMS_PER_BATCH is {total_batch_size}, for {comm.get_world_size()} "
                "processes; set it to a multiple of their number (in a LazyConfig: "
                "dataloader.train.total_batch_size)"
            )
        groups = None
        if aspect_ratio_grouping:
            groups = [record["width"] > record["height"] for record in dataset]
        self.seed, self.num_images = seed, len(dataset)
        if cache_images:
            names = [record.get("file_name") for record in dataset]
            mapper = CachedMapper(mapper, plan_cache(dataset), names, max_pixels)
        else:
            mapper = naming(mapper, max_pixels)
        if isinstance(dataset, list):
            dataset = DatasetFromList(dataset, copy=False)
        self.dataset = dataset  # the records, before the mapper
        self._samples = _Samples(dataset, mapper, seed, mosaic)
        # detectron2's samplers are a process's part of this order.
        self._batches = BatchSampler(sampler._infinite_indices, total_batch_size, groups)
        self._options = {"collate_fn": collate_fn or _as_list, **options}

    @property
    def total_batch_size(self) -> int:
        return self._batches.total_batch_size

    @property
    def first_batch(self) -> int:
        """The batch that the next iterator starts with; set it to go on."""
        return self._batches.start

    @first_batch.setter
    def first_batch(self, number: int) -> None:
        self._batches.start = number

    def __iter__(self) -> Iterator[list[dict]]:
        # torch draws a seed for the workers; not from the generator that the model draws from.
        generator = torch.Generator().manual_seed(self.seed)
        options = {"generator": generator, **self._options}
        return iter(DataLoader(self._samples, batch_sampler=self._batches, **options))


class _Samples(Dataset):
    """What the mapper makes of (position, index): the same in every process."""

    def __init__(
        self,
        dataset: Dataset,
        mapper: Callable[[dict], dict],
        seed: int,
        mosaic: Mosaic | None = None,
    ):
        self.dataset, self.mapper, self.seed = dataset, PicklableWrapper(mapper), seed
        self.mosaic = mosaic

    def __getitem__(self, place: tuple[int, int]) -> dict:
        position, index = place
        skipped: dict[str, str] = {}  # names and reasons; such a picture isn't tried again
        tried = set()
        for attempt in range(MAX_REPLACEMENTS):
            with seeded(SAMPLE, self.seed, position, attempt):
                if attempt:
                    index = int(torch.randint(len(self.dataset), ()))
                tried.add(index)
                if self.dataset[index].get("file_name") in skipped:
                    continue
                try:
                    sample = self._sample(position, index)
                except BadPicture as error:
                    skipped[error.file_name] = str(error)
                    continue
            if sample is not None:
                return {**sample, "skipped": [*skipped.items()]} if skipped else sample
        reason = list(skipped.values())[-1] if skipped else "the mapper returned None"
        raise UserError(
            f"none of {len(tried)} images that were tried for one place of a batch can be used; "
            f"the last: {reason}"
        )

    def _sample(self, position: int, index: int) -> dict | None:
        """Of one image, or of four."""
        is_mosaic = self.mosaic is not None and self.mosaic.is_due(position)
        others = torch.randint(len(self.dataset), (3,)).tolist() if is_mosaic else []
        samples = [self.mapper(self.dataset[i]) for i in (index, *others)]
        return self.mosaic(samples) if is_mosaic and None not in samples else samples[0]


def _as_list(batch: list[dict]) -> list[dict]:
    return batch


def build_train_loader(
    cfg: CfgNode | DictConfig, seed: int, node: CfgNode | None = None, **options: object
) -> Iterable:
    """The loader of a config's training images, for both kinds of config.

    Args:
        seed: not negative.
        node: ``MODEL.RETINA_FOCAL``; default: that of a YAML config, and of a LazyConfig stock's.
        options: of `TrainLoader`, beside those of the config.
    Returns:
        A `TrainLoader`. Where a LazyConfig names another kind of loader, an iterable dataset or a
        sampler that is not detectron2's, the loader that it names: a run can't be resumed exactly
        with it.
    Raises:
        UserError: more pictures are missing, or the images can't be shared among the processes.
    """
    if node is None:
        node = retina_focal_node(get_cfg() if isinstance(cfg, DictConfig) else cfg)
    with seeded(ORDER, seed):  # samplers draw their seed
        if isinstance(cfg, DictConfig):
            refuse_for_lazy(node.TRAIN.AUGMENT)
            loader = cfg.dataloader.train
            target = loader["_target_"]
            target = locate(target) if isinstance(target, str) else target
            if target is not build_detection_train_loader:
                return instantiate(loader)
            arguments = {
                key: instantiate(_keep_empty(x) if key == "dataset" and node.DATA.KEEP_EMPTY else x)
                for key, x in loader.items()
                if key != "_target_"
            }
        else:
            if node.DATA.KEEP_EMPTY:
                cfg = cfg.clone()
                cfg.defrost()
                cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
            arguments = _train_loader_from_config(cfg, mapper=BoxMapper(cfg, True))
            add_augmentations(arguments["mapper"], node.TRAIN.AUGMENT)
        dataset = arguments["dataset"]
        if isinstance(dataset, list):
            expect_pictures(dataset, "the training data", node.DATA.MAX_BAD_IMAGES)
        if arguments.get("sampler") is None and not isinstance(
            dataset, torch.utils.data.IterableDataset
        ):
            arguments["sampler"] = TrainingSampler(len(dataset))
    if node.TRAIN.CACHE_IMAGES:
        _expect_detectron2s(arguments["mapper"])
        options["cache_images"] = True
    if node.DATA.IGNORE_REGIONS:
        arguments["mapper"] = keeping_regions(arguments["mapper"])
    if not hasattr(arguments.get("sampler"), "_infinite_indices"):
        return build_detection_train_loader(**arguments)
    if not arguments.get("num_workers"):
        options.pop("timeout", None)
    return TrainLoader(**{**options, **arguments}, seed=seed)


def _expect_detectron2s(mapper: Callable) -> None:
    """Refuse a mapper that may read its pictures from elsewhere than a record says (UserError)."""
    if not isinstance(mapper, DatasetMapper):
        raise UserError(
            f"TRAIN.CACHE_IMAGES is True, but the mapper is {getattr(mapper, '__name__', mapper)}; "
            "expected detectron2's DatasetMapper, which reads what its record names; add: "
            "MODEL.RETINA_FOCAL.TRAIN.CACHE_IMAGES False"
        )


def _keep_empty(dataset: DictConfig) -> DictConfig:
    """A LazyConfig's dataset with the images that have no box; one of another kind as it is."""
    target = dataset.get("_target_") if isinstance(dataset, DictConfig) else None
    target = locate(target) if isinstance(target, str) else target
    return {**dataset, "filter_empty": False} if target is get_detection_dataset_dicts else dataset
