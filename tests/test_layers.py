"""Imports point down, and importing the package registers names and does nothing else."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import retina_focal

PACKAGE = Path(retina_focal.__file__).parent
# From the ground up: a module imports from its own layer or one below. A folder is one room.
LAYERS = [
    {"kernels"},
    {"errors"},
    {"config", "files", "safe_yaml"},
    {"consistency", "limits", "merging"},
    {
        "places",
        "losses",
        "box_losses",
        "matching",
        "precision",
        "folding",
        "folding_timm",
        "normalizers",
        "transfer",
        "padding",
    },
    {
        "dense_sum",
        "sampling",
        "anchors",
        "assigner",
        "box_tower",
        "backbone",
        "ground_truth",
        "drawing",
        "network",
        "graphs",
    },
    {"atss", "candidates", "head", "later_losses", "other_anchors", "targets"},
    {"criterion", "postprocess"},
    {"retinanet", "proposals"},
    {"data", "weights"},
    {"training", "evaluation", "export"},
    {"tools"},
]
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
DYNAMIC = ("import_module", "__import__")
# What commands share; they import no other command.
SHARED_TOOLS = {"arguments", "common", "points", "reports", "runs"}


def module_of(path: Path) -> tuple[str, ...]:
    """("tools", "ablate", "report") of retina_focal/tools/ablate/report.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path, source: str | None = None) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, in any form and at any depth of its code.

    () is the package itself, through which every module can be had.
    """
    found = set()
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(DYNAMIC):
            # An f-string ends in the dot before the name.
            found.update(re.findall(r"\bretina_focal[\w.]*\b", ast.unparse(node)))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = package[: len(package) - node.level + 1]
                base = ".".join(("retina_focal", *inside, *filter(None, [base])))
            # What is imported from a package may be a module of it.
            found.update(f"{base}.{alias.name}" for alias in node.names)
    names = (tuple(name.split(".")) for name in found)
    return {name[1:] for name in names if name[0] == "retina_focal"}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def check_layers(path: Path, source: str | None = None) -> None:
    room = module_of(path)[0]
    assert room in LAYER, f"{room} stands in no layer; add it to LAYERS"
    for name in imports_of(path, source):
        if room == "tools" and not name:
            continue  # what a user imports
        named = f"{room} imports {'.'.join(('retina_focal', *name))}"
        assert name and name[0] in LAYER, f"{named}, which is no module of a layer"
        assert LAYER[name[0]] <= LAYER[room], named


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_never_imports_from_a_higher_layer(path):
    check_layers(path)


def test_the_layers_name_each_module_once_and_nothing_else():
    assert sorted(name for names in LAYERS for name in names) == sorted(
        {module_of(path)[0] for path in MODULES}
    )


@pytest.mark.parametrize(
    "path, source, message",
    [
        ("stray.py", "", "stray stands in no layer"),
        ("stray/deep/module.py", "", "stray stands in no layer"),
        (
            "losses.py",
            "def f():\n    from retina_focal import tools",
            "losses imports",
        ),
        (
            "losses.py",
            "if TYPE_CHECKING:\n    from . import head",
            "losses imports",
        ),
        ("losses.py", "from retina_focal import Trainer", "Trainer, which is no module"),
        ("losses.py", "from retina_focal import *", "which is no module"),
        ("losses.py", "import retina_focal", "retina_focal, which is no module"),
        (
            "data/sample.py",
            "import_module('retina_focal.tools.train')",
            "data imports",
        ),
        (
            "data/sample.py",
            "import_module(f'retina_focal.tools.{x}')",
            "data imports",
        ),
        (
            "kernels/focal_loss.py",
            "from ..errors import UserError",
            "kernels imports",
        ),
    ],
)
def test_a_stray_module_and_an_import_upwards_are_found(path, source, message):
    with pytest.raises(AssertionError, match=message):
        check_layers(PACKAGE / path, source)


def test_no_command_imports_another():
    for path in MODULES:
        own = module_of(path)
        if own[0] == "tools" and len(own) > 1:
            others = {name[1] for name in imports_of(path) if name[:1] == ("tools",) < name}
            assert others <= {own[1], *SHARED_TOOLS}, f"{'.'.join(own)} imports {others}"


def test_no_module_of_the_package_imports_itself_in_a_circle():
    names = {module_of(path): path for path in MODULES}
    below = {
        own: {name[:n] for name in imports_of(path) for n in range(1, 4) if name[:n] in names}
        - {own[:n] for n in range(1, 4)}
        for own, path in names.items()
    }
    done, path = set(), []

    def visit(own: tuple[str, ...]) -> None:
        assert own not in path, f"a circle: {path[path.index(own) :]}"
        if own not in done:
            path.append(own)
            for other in below[own]:
                visit(other)
            path.pop()
            done.add(own)

    for own in below:
        visit(own)


@pytest.mark.parametrize(
    "source, found",
    [
        ("import retina_focal.tools.train", {("tools", "train")}),
        ("from retina_focal import tools", {("tools",)}),
        ("from retina_focal.tools import train", {("tools", "train")}),
        ("def f():\n    from retina_focal.tools.train import main", {("tools", "train", "main")}),
        ("from ..tools import train", {("tools", "train")}),
        ("from . import registration", {("data", "registration")}),
        ("from .. import tools", {("tools",)}),
        ("import retina_focal as package", {()}),
        ("import torch\nfrom torch import nn", set()),
    ],
)
def test_every_form_of_import_is_read(source, found):
    assert imports_of(PACKAGE / "data" / "sample.py", source) == found


def test_importing_the_package_changes_nothing_global():
    script = """
import logging, sys, torch, warnings
import detectron2.modeling, detectron2.config, detectron2.evaluation, detectron2.utils.events
import detectron2.engine
def state():
    return (torch.save, torch.load, torch.get_default_dtype(), torch.get_num_threads(),
            torch.backends.cudnn.benchmark, torch.backends.mkldnn.enabled,
            torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            detectron2.config.get_cfg().dump(), logging.getLogger().level,
            list(logging.getLogger().handlers), list(warnings.filters))
before, modules = state(), set(sys.modules)
import retina_focal
assert state() == before
new = {name.split(".")[0] for name in set(sys.modules) - modules}
assert not new & {"timm", "onnx", "matplotlib", "triton"}, new
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
