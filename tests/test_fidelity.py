"""What a config says of itself, and what the references say."""

import re
from functools import reduce
from pathlib import Path

import pytest
from detectron2.config import CfgNode

from retina_focal import get_cfg
from retina_focal.config import flatten
from retina_focal.tools.fidelity import command as fidelity
from retina_focal.tools.fidelity import settings
from retina_focal.tools.fidelity.settings import READERS, SETTINGS, frozen

CONFIGS = Path(__file__).parents[1] / "configs"
PAPER = CONFIGS / "COCO-Detection" / "retinanet_R_50_FPN_paper_600.yaml"
ZOO_1X = CONFIGS / "COCO-Detection" / "retinanet_R_50_FPN_1x.yaml"


def load(path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(path, allow_unsafe=False)
    return cfg


SHIPPED = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if load(path).MODEL.META_ARCHITECTURE == "FocalRetinaNet"
]
# The others are completed by those that name them as _BASE_.
WHOLE = [p for p in SHIPPED if (cfg := load(p)).MODEL.WEIGHTS and cfg.DATASETS.TRAIN]


def differences(cfg: CfgNode, reference: str) -> set[str]:
    return {row.setting for row in fidelity.compare(cfg, reference) if row.differs}


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


@pytest.mark.parametrize("path", WHOLE, ids=name)
def test_a_shipped_config_has_no_difference_that_its_header_does_not_declare(path, capsys):
    declared = fidelity.declaration(path)
    assert declared.reference, f"{name(path)} and its bases lack a line '# Follows: ...'"
    assert differences(load(path), declared.reference) <= declared.differences
    fidelity.main([str(path)])
    printed = capsys.readouterr().out
    assert "not declared" not in printed
    assert printed.count("## ") == 1  # with the reference that it follows, and no other


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_header_declares_no_difference_that_is_not_there(path, tmp_path):
    reference = fidelity.declaration(path).reference
    alone = tmp_path / "header.yaml"  # without the declarations of its bases
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    alone.write_text("\n".join([*header, "VERSION: 2"]))
    assert fidelity.declaration(alone).differences <= differences(load(path), reference)


# What has no effect beside the other values of retinanet_R_50_FPN_1x.yaml.
WITHOUT_EFFECT = {
    "MODEL.ANCHOR_GENERATOR.SIZES",  # OctaveAnchorGenerator has its own, and refuses others
    "MODEL.FPN.IN_FEATURES",  # the pyramid's builder needs these three
    "MODEL.RESNETS.OUT_FEATURES",
    "MODEL.RETINA_FOCAL.ASYMMETRIC.GAMMA_NEG",
    "MODEL.RETINA_FOCAL.ASYMMETRIC.GAMMA_POS",
    "MODEL.RETINA_FOCAL.ASYMMETRIC.MARGIN",
    "MODEL.RETINA_FOCAL.FOCAL_STAR.BETA",
    "MODEL.RETINA_FOCAL.HINGE.MARGIN",
    "MODEL.RETINA_FOCAL.OHEM.BATCH_SIZE",
    "MODEL.RETINA_FOCAL.OHEM.NEG_PER_POS",
    "MODEL.RETINA_FOCAL.OHEM.NMS_THRESH",
    "MODEL.RETINA_FOCAL.POLY1.EPSILON",
    "MODEL.RETINA_FOCAL.TIMM.NAME",
    "MODEL.RETINA_FOCAL.TIMM.NORM",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
}


def changed(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 0.25
    if isinstance(value, tuple):
        return (*value[:-1], changed(value[-1])) if value else ("x",)
    return "x" if value is None else f"{value}x"


# The scales of an octave are a whole number, and None has no neighbour.
SPECIAL = {"MODEL.RETINA_FOCAL.ANCHORS.SCALES_PER_OCTAVE": 2, "SOLVER.WEIGHT_DECAY_BIAS": 0.0}


def test_no_key_that_matters_can_change_unseen():
    cfg = load(ZOO_1X)
    assert not differences(cfg, "detectron2")
    unseen = set()
    for key, value in flatten(cfg).items():
        *parents, leaf = key.split(".")
        node = reduce(getattr, parents, cfg)
        before = node[leaf]
        node[leaf] = SPECIAL.get(key, changed(frozen(value)))
        if not key.startswith(fidelity.PASSIVE) and not differences(cfg, "detectron2"):
            unseen.add(key)
        node[leaf] = before
    assert unseen == WITHOUT_EFFECT


@pytest.mark.parametrize(
    ("keys", "setting"),
    [
        ("MODEL: {RETINANET: {FOCAL_LOSS_GAMMA: 1.0}}", "gamma"),
        ("MODEL: {RETINA_FOCAL: {OHEM: {ENABLED: True}}}", "OHEM"),
        ("MODEL: {RETINA_FOCAL: {ALPHA_FROM_DATA: True}}", "alpha"),
        ("SOLVER: {IMS_PER_BATCH: 8}", "images per step"),
        ("INPUT: {MIN_SIZE_TEST: 640}", "test scale"),
    ],
)
def test_a_key_changed_without_the_header_is_named(keys, setting, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(f'# Mine.\n_BASE_: "{PAPER}"\n{keys}\n')
    fidelity.main([str(path)])
    assert f"not declared in the header: {setting}\n" in capsys.readouterr().out
    path.write_text(f"# Differs in: {setting}\n{path.read_text()}")
    fidelity.main([str(path)])
    printed = capsys.readouterr().out
    assert "not declared" not in printed
    assert "## 3 differences from the paper" in printed  # with those of the bases


def test_overrides_are_compared_and_are_in_no_header(capsys):
    fidelity.main([str(PAPER), "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "0.5", "SOLVER.BASE_LR", "0.02"])
    printed = capsys.readouterr().out
    assert "not declared in the header: gamma, learning rate\n" in printed
    assert "0.5" in printed and "Table 1b" in printed


@pytest.mark.parametrize(
    "argv",
    [
        ["--config-file", str(PAPER), "SOLVER.BASE_LR", "0.02"],
        [str(PAPER), "--reference", "paper", "SOLVER.BASE_LR", "0.02"],
        ["--reference", "paper", str(PAPER), "SOLVER.BASE_LR", "0.02"],
    ],
)
def test_a_config_is_taken_with_and_without_the_option(argv, capsys):
    fidelity.main(argv)
    printed = capsys.readouterr().out
    assert printed.count("## ") == 1 and f"# {PAPER}: follows paper" in printed
    assert "not declared in the header: learning rate\n" in printed


def test_several_configs_are_taken_in_the_order_of_the_command_line(capsys):
    fidelity.main(["--config-file", str(ZOO_1X), "--config-file", str(PAPER)])
    titles = re.findall(r"^# (.*):", capsys.readouterr().out, re.MULTILINE)
    assert titles == [str(ZOO_1X), str(PAPER)]


@pytest.mark.parametrize(
    "argv, message",
    [([], "no config is given"), (["SOLVER.BASE_LR", "1"], "'SOLVER.BASE_LR' is no YAML config")],
)
def test_without_a_config_it_says_what_to_type(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        fidelity.main(argv)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and message in printed and "quick_start/bccd.yaml" in printed


def test_a_key_without_a_setting_is_compared_with_detectron2_under_its_own_name(capsys):
    fidelity.main([str(ZOO_1X), "SOLVER.NESTEROV", "True"])
    printed = capsys.readouterr().out
    assert re.search(r"\| SOLVER.NESTEROV +\| on +\| off ", printed)
    assert "not declared in the header: SOLVER.NESTEROV\n" in printed


def test_a_reference_on_request_or_all_three(capsys):
    fidelity.main(["--reference", "detectron", str(PAPER)])
    assert re.findall(r"from (\w+)", capsys.readouterr().out)[0] == "Detectron"
    fidelity.main(["--reference", "all", "--markdown", str(PAPER), str(ZOO_1X)])
    printed = capsys.readouterr().out
    assert printed.count("## ") == 6
    assert "## no differences from detectron2" in printed


# The check-list of what stock detectron2 does otherwise: Sec. 4 and 4.1 of the paper against
# defaults.py, Base-RetinaNet.yaml and meta_arch/retinanet.py; likewise Detectron's sources.
STOCK_AND_PAPER = {"box loss", "low-quality matches", "normaliser", "training scales", "warm-up"}
STOCK_AND_DETECTRON = STOCK_AND_PAPER | {
    "anchor offset",
    "bias updates",
    "box geometry",
    "clipping to the image",
    "padding",
    "pixel mean",
    "score threshold",
}


def test_stock_detectron2_differs_from_paper_and_detectron_where_it_is_known_to():
    stock = fidelity.zoo()[0]
    assert differences(stock, "paper") == STOCK_AND_PAPER
    assert differences(stock, "detectron") == STOCK_AND_DETECTRON
    assert not any(differences(cfg, "detectron2") for cfg in fidelity.zoo())


def test_values_of_detectron2_are_read_from_detectron2(monkeypatch):
    gamma = next(setting for setting in SETTINGS if setting.name == "gamma")
    cfg = fidelity.zoo()[0].clone()
    cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = 7.0
    monkeypatch.setattr(fidelity, "zoo", lambda: (cfg,))
    fidelity.choice_of.cache_clear()
    assert fidelity.choice_of(gamma, "detectron2").values == (7.0,)
    fidelity.choice_of.cache_clear()


@pytest.mark.parametrize(
    ("name", "source"), [("prior", "detectron2 defaults.py"), ("anchor scales", "model zoo")]
)
def test_a_value_of_detectron2_is_said_to_be_where_it_is_set(name, source):
    """Base-RetinaNet.yaml sets the scales of an octave; defaults.py has one anchor size."""
    (setting,) = (setting for setting in SETTINGS if setting.name == name)
    assert fidelity.choice_of(setting, "detectron2").source.endswith(source)


def test_consequences_quote_the_ap_of_the_ablations():
    consequence = {setting.name: setting.consequence for setting in SETTINGS}
    for path in CONFIGS.glob("ablations/table_1[ab]_*.yaml"):
        node, ap = load(path).MODEL.RETINANET, quoted_ap(path)
        if "1a" in path.stem:
            assert f" {node.FOCAL_LOSS_ALPHA:g} {ap}" in consequence["alpha"]
        else:
            assert f" {node.FOCAL_LOSS_GAMMA:g} {ap}" in consequence["gamma"]
    for setting, name in [
        ("anchor scales", "table_1c_*"),
        ("OHEM", "table_1d_ohem_128_nms_0.5"),
        ("OHEM", "table_1d_focal_loss"),
        ("class loss", "table_3_*"),
        ("aspect ratios", "table_1c_3_*"),
    ]:
        for path in CONFIGS.glob(f"ablations/{name}.yaml"):
            assert quoted_ap(path) in consequence[setting], path.stem


def quoted_ap(path: Path) -> str:
    return re.search(r"AP75: ([\d.]+),", path.read_text())[1]


def test_settings_have_names_of_their_own_that_a_header_can_list():
    text = Path(settings.__file__).with_name("settings.yaml").read_text()
    # As they stand in the file: YAML takes the last of two with one name.
    names = re.findall(r"^([^#\s].*):$", text, re.MULTILINE)
    assert names == [setting.name for setting in SETTINGS] and len(set(names)) == len(names)
    assert not any("," in name or ":" in name for name in names)
    assert set(READERS) < set(names)
    for setting in SETTINGS:
        assert setting.consequence and len(setting.keys) == len(set(setting.keys))
        assert setting.keys or setting.always


def test_words_of_the_settings_are_text():
    """YAML takes off and on for truth values."""
    for setting in SETTINGS:
        for choice in filter(None, (setting.paper, setting.detectron)):
            assert isinstance(choice.text, str) and isinstance(choice.source, str)
            assert not any(isinstance(value, bool) for value in choice.values), setting.name


def test_differences_from_another_reference_are_not_inherited(tmp_path):
    header = "# Follows: detectron2\n# Differs in: gamma, alpha\n"
    (tmp_path / "base.yaml").write_text(f"{header}VERSION: 2\n")
    (tmp_path / "same.yaml").write_text("# Differs in: prior\n_BASE_: base.yaml\n")
    (tmp_path / "other.yaml").write_text("# Follows: paper\n_BASE_: 'base.yaml'\n")
    assert fidelity.declaration(tmp_path / "same.yaml") == (
        "detectron2",
        {"gamma", "alpha", "prior"},
    )
    assert fidelity.declaration(tmp_path / "other.yaml") == ("paper", frozenset())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Follows: the paper\nVERSION: 2\n", "expected one of paper, detectron, detectron2"),
        ("MODEL: {META_ARCHITECTURE: GeneralizedRCNN}\n", "can be compared are RetinaNet"),
        ("MODEL: {RETINANET: {GAMMA: 2}}\n", "there is no key .MODEL.RETINANET.GAMMA"),
    ],
)
def test_what_cannot_be_compared_is_said_in_words(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        fidelity.main([str(path)])
