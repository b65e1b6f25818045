"""The values of a training, by one name for both kinds of config."""

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from retina_focal.config import flatten, get_cfg
from retina_focal.errors import UserError
from retina_focal.merging import merge_options

# What a LazyConfig has of MODEL.RETINA_FOCAL, in lower case, in `train.retina_focal`; all else is
# an argument of one of its parts.
TRAINING_KEYS = ("ACCUMULATE_STEPS", "TRAIN", "DATA", "TEST")
# What a LazyConfig calls other values of its training.
LAZY_NAMES = {
    "SEED": "train.seed",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "TEST.EVAL_PERIOD": "train.eval_period",
}


def plain_values(cfg: CfgNode | DictConfig) -> CfgNode:
    """A YAML config as it is; the values of a LazyConfig's training under the names of a YAML.

    Raises:
        UserError: in a LazyConfig's `train.retina_focal` is what is none of the `TRAINING_KEYS`.
    """
    if not isinstance(cfg, DictConfig):
        return cfg
    train = OmegaConf.to_container(cfg.train, resolve=True)
    defaults = get_cfg().MODEL.RETINA_FOCAL
    ours = CfgNode({key: defaults[key] for key in TRAINING_KEYS})
    found = flatten({k: v for k, v in train.get("retina_focal", {}).items() if k != "sources"})
    try:
        merge_options(ours, [x for key, value in found.items() for x in (key.upper(), value)])
    except UserError as error:
        raise UserError(f"train.retina_focal: {str(error).lower()}") from error
    names = {}
    for split in ("train", "test"):
        found = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names", default=())
        names[split.upper()] = (found,) if isinstance(found, str) else tuple(found)
    ours.TRAIN.KEEP_CHECKPOINTS = train["checkpointer"].get("max_to_keep") or 0
    images, workers = (
        OmegaConf.select(cfg, f"dataloader.train.{name}", default=0)
        for name in ("total_batch_size", "num_workers")
    )
    return CfgNode(
        {
            "OUTPUT_DIR": train["output_dir"],
            "SEED": train.get("seed", -1),
            "MODEL": {"WEIGHTS": train["init_checkpoint"] or "", "RETINA_FOCAL": ours},
            "DATASETS": names,
            "DATALOADER": {"NUM_WORKERS": workers},
            "SOLVER": {
                "MAX_ITER": train["max_iter"],
                "IMS_PER_BATCH": images,
                "REFERENCE_WORLD_SIZE": 0,
                "CHECKPOINT_PERIOD": train["checkpointer"]["period"],
                "AMP": {"ENABLED": train["amp"]["enabled"]},
            },
            "TEST": {
                "EVAL_PERIOD": train["eval_period"],
                "EXPECTED_RESULTS": [],
                "PRECISE_BN": {"ENABLED": False},
            },
        }
    )
