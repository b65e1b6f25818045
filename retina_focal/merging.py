"""Files and options merged into a config, running nothing of them."""

import difflib
import logging
import re
from collections.abc import Sequence

from detectron2.config import CfgNode, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version

from retina_focal.config import flatten, package_config
from retina_focal.errors import UserError
from retina_focal.safe_yaml import read_yaml_with_bases

# What yacs says of a value of another type.
MISMATCH = re.compile(r"Type mismatch .* with values \((.*) vs\. (.*)\) for config key: (.*)")

logger = logging.getLogger(__name__)


def merge_file(cfg: CfgNode, path: str) -> None:
    """Merge a YAML config and what its ``_BASE_`` names, running nothing of them.

    As detectron2's `merge_from_file`, old versions of its keys included.

    Raises:
        UserError: see `read_yaml_with_bases`; or it has an unknown key or a value of another type.
    """
    loaded = CfgNode(read_yaml_with_bases(path, package_config))
    for key, value in loaded.items():
        if isinstance(cfg.get(key), CfgNode) and not isinstance(value, CfgNode):
            raise UserError(f"{path}: {key} is {value!r}; expected KEY: VALUE below it")
    try:
        version = loaded.get("VERSION") or guess_version(loaded, path)
        if version == cfg.VERSION:
            cfg.merge_from_other_cfg(loaded)
        elif type(version) is int and 1 <= version < cfg.VERSION:
            old = downgrade_config(cfg, to_version=version)
            old.merge_from_other_cfg(loaded)
            new = upgrade_config(old)
            cfg.clear()
            cfg.update(new)
        else:
            raise UserError(f"VERSION is {version}; expected at most {cfg.VERSION}")
    except KeyError as error:
        key = str(error.args[0]).rpartition(": ")[2]
        is_old = version != cfg.VERSION
        text = f"VERSION {version} names keys otherwise, and has no '{key}'; leave VERSION out"
        raise UserError(f"{path}: {text if is_old else _no_such_key(cfg, key)}") from error
    except (AssertionError, TypeError, ValueError) as error:  # yacs asserts
        found = MISMATCH.fullmatch(str(error))
        text = f"{found[3]} is {found[2]}; expected, for example, {found[1]}" if found else error
        raise UserError(f"{path}: {text}") from error
    except (MemoryError, RecursionError) as error:  # yacs reads a text as Python writes a value
        raise UserError(f"{path}: a value is nested too deeply") from error
    if "RETINA_FOCAL" in cfg.MODEL:
        # Whoever wrote the file may have written the dataset: only who types a command decides.
        if cfg.MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE:
            logger.warning("%s can't set DATA.ALLOW_OUTSIDE True: type it, if you mean it", path)
        cfg.MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE = False


def merge_options(cfg: CfgNode, options: Sequence[str]) -> None:
    """Merge KEY VALUE pairs, as they stand on a command line.

    Raises:
        UserError: an unknown key, a value of another type, or a key without a value.
    """
    if len(options) % 2:
        raise UserError(
            f"the options {' '.join(map(str, options))} are no pairs; expected KEY VALUE KEY VALUE"
        )
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key not in flatten(cfg):
            raise UserError(_no_such_key(cfg, key))
        try:
            cfg.merge_from_list([key, value])
        except (MemoryError, RecursionError, TypeError, ValueError) as error:
            wanted = flatten(cfg)[key]
            is_int = str(value).lstrip("+-").isdecimal()
            example = f"{int(value)}.0" if is_int and isinstance(wanted, float) else wanted
            raise UserError(
                f"{key} is of type {type(wanted).__name__}, which {value} is not; type {key} "
                f"{example}"
            ) from error


def _no_such_key(cfg: CfgNode, key: str) -> str:
    keys = flatten(cfg)
    nodes = {x[:i] for x in keys for i, letter in enumerate(x) if letter == "."}
    near = difflib.get_close_matches(key, [*keys, *sorted(nodes)], n=3)
    return f"there is no key '{key}'" + (f"; near it: {', '.join(near)}" if near else "")
