"""The seed of a run, drawn once where the config has none."""

from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from retina_focal.training.checkpoint_files import own_checkpoints, peek
from retina_focal.training.run_files import seed_of_config
from retina_focal.training.saved_state import RESUME_HOOK


def with_seed(cfg: CfgNode | DictConfig, seed: int | None = None) -> CfgNode | DictConfig:
    """The config with this seed; by default with its own, or one that is drawn where it has none.

    The seed is the same in all processes. A LazyConfig is changed in place.
    """
    is_lazy = isinstance(cfg, DictConfig)
    if seed is None:
        seed = OmegaConf.select(cfg, "train.seed", default=-1) if is_lazy else cfg.SEED
        if seed >= 0:
            return cfg
        seed = comm.shared_random_seed()
    if is_lazy:
        OmegaConf.update(cfg, "train.seed", seed, force_add=True)
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg


def saved_seed(folder: str) -> int | None:
    """The seed that a run in the folder has drawn, in all processes; None where it is not known.

    It is in the newest checkpoint; before the first one, in the run's config.
    """
    seed = None
    if comm.is_main_process():
        content = next(filter(None, map(peek, own_checkpoints(folder))), {})
        hooks_state = content.get("trainer", {}).get("hooks", {})
        seed = hooks_state.get(RESUME_HOOK, {}).get("seed")
        seed = seed_of_config(folder) if seed is None else seed
    return comm.all_gather(seed)[0]
