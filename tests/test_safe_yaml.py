"""Configs come out as detectron2 reads them; those from a stranger run nothing and are named."""

import os
import pickle
import re
import sys
from pathlib import Path

import detectron2.model_zoo
import pytest
import yaml
from conftest import Canary
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_get_cfg

from retina_focal.config import get_cfg, package_config
from retina_focal.errors import UserError
from retina_focal.merging import merge_file, merge_options
from retina_focal.safe_yaml import EXPRESSION, read_yaml, read_yaml_with_bases
from retina_focal.tools import cli

ZOO = Path(detectron2.model_zoo.__file__).parent / "configs"
OURS = Path(__file__).parents[1] / "configs"
RETINANET = (ZOO / "Base-RetinaNet.yaml").read_text()


def merged(path: Path) -> CfgNode:
    cfg = get_cfg()
    merge_file(cfg, str(path))
    return cfg


def test_every_config_of_the_zoo_and_of_ours_is_read_as_detectron2_reads_it():
    paths = [*ZOO.rglob("*.yaml"), *OURS.rglob("*.yaml")]
    assert len(paths) > 150
    for path in paths:
        expected = CfgNode.load_yaml_with_base(str(path), allow_unsafe=True)
        assert read_yaml_with_bases(path, package_config) == expected, path


def test_a_config_of_detectron2s_first_version_is_upgraded_as_detectron2_does(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("VERSION: 1\nMODEL: {WEIGHT: x.pkl, RESNETS: {DEPTH: 101}}")
    expected = detectron2_get_cfg()
    expected.merge_from_file(str(path))
    cfg = detectron2_get_cfg()
    merge_file(cfg, str(path))
    assert cfg == expected and cfg.MODEL.WEIGHTS == "x.pkl"


def test_a_base_is_found_beside_above_absolute_at_home_and_in_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "below"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("SEED: 3")
    (folder / "linked.yaml").symlink_to(tmp_path / "base.yaml")
    path = folder / "mine.yaml"
    for name in ("../base.yaml", str(tmp_path / "base.yaml"), "~/base.yaml", "linked.yaml"):
        path.write_text(f"_BASE_: {name}")
        assert merged(path).SEED == 3
    path.write_text("_BASE_: [quick_start/bccd.yaml, ../base.yaml]\nMODEL: {WEIGHTS: x}")
    cfg = merged(path)
    assert (cfg.SEED, cfg.MODEL.WEIGHTS) == (3, "x")
    assert cfg.MODEL.BACKBONE == merged(OURS / "quick_start" / "bccd.yaml").MODEL.BACKBONE


def test_a_node_that_an_alias_repeats_is_changed_alone(tmp_path):
    (tmp_path / "base.yaml").write_text("A: &a {X: 1}\nB: *a\nC: {<<: *a, Y: 2}")
    (tmp_path / "mine.yaml").write_text("_BASE_: base.yaml\nA: {X: 5}")
    found = read_yaml_with_bases(tmp_path / "mine.yaml", package_config)
    assert found == {"A": {"X": 5}, "B": {"X": 1}, "C": {"X": 1, "Y": 2}}


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfSEED: 3")
    assert merged(tmp_path / "mine.yaml").SEED == 3


def test_only_a_command_allows_pictures_outside_of_their_folder(tmp_path, caplog):
    (tmp_path / "mine.yaml").write_text("MODEL: {RETINA_FOCAL: {DATA: {ALLOW_OUTSIDE: True}}}")
    cfg = merged(tmp_path / "mine.yaml")
    assert not cfg.MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE
    assert "mine.yaml can't set DATA.ALLOW_OUTSIDE True" in caplog.text
    merge_options(cfg, ["MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE", "True"])
    assert cfg.MODEL.RETINA_FOCAL.DATA.ALLOW_OUTSIDE


def bomb(value: str, repeat: str) -> str:
    """Nine levels, each nine times the one before: 400 million values."""
    lines = [f"a0: &a0 {value}"]
    for i in range(1, 10):
        lines.append(f"a{i}: &a{i} " + repeat % tuple(f"*a{i - 1}" for _ in range(9)))
    return "\n".join(lines)


CALL = "!!python/object/apply:builtins.open [{canary}, w]"
LISTS = "[%s, %s, %s, %s, %s, %s, %s, %s, %s]"
NODES = "{a: %s, b: %s, c: %s, d: %s, e: %s, f: %s, g: %s, h: %s, i: %s}"
# What it is: its text, and what is said of it.
TEXTS = {
    "call": (f"SEED: 1\nOUTPUT_DIR: {CALL}", r"line 2: the tag !!python/object/apply:builtin"),
    "call at the root": (CALL, "line 1: the tag !!python"),
    "call as a key": (f"? {CALL}\n: 1", "line 1: the tag !!python"),
    "call by another handle": (
        "%TAG !e! tag:yaml.org,2002:python/object/apply:\n---\nA: !e!os.system ['x']",
        r"line 3: the tag !!python/object/apply:os\.system",
    ),
    "call in full": (
        "A: !<tag:yaml.org,2002:python/object/new:os.system> ['x']",
        "the tag !!python/object/new",
    ),
    "name": ("A: !!python/name:os.system", "the tag !!python/name"),
    "module": ("A: !!python/module:antigravity", "the tag !!python/module"),
    "tuple": ("A: !!python/tuple [1]", "the tag !!python/tuple"),
    "own tag": ("A: !mine x", "the tag !mine"),
    "binary": ("A: !!binary aGk=", "the tag !!binary"),
    "another expression": (RETINANET.replace("512 ]]", "512 ]][0]"), "line 8: the tag !!python"),
    "an expression and more": (
        RETINANET.replace('512 ]]"]', '512 ]]", {canary: 1}]'),
        "line 8: the tag !!python",
    ),
    "expression of another tag": (
        RETINANET.replace("apply:eval", "apply:exec"),
        "line 8: the tag !!python/object/apply:exec",
    ),
    "bomb of lists": (bomb("[x, x]", LISTS), "values, those of aliases too"),
    "bomb of nodes": (bomb("{x: 1}", NODES), "values, those of aliases too"),
    "bomb of merges": (bomb("{x: 1}", "{<<: " + LISTS + "}"), "values, those of aliases too"),
    "alias of itself": ("A: &a [*a]", "line 1: an alias stands inside"),
    "deep lists": ("A: " + "[" * 400_000, "deeper than 32"),
    "deep nodes": ("{A: " * 200_000, "deeper than 32"),
    "deep text": (f"OUTPUT_DIR: '{'-' * 9000}1'", "nested too deeply"),
    "deep sum": (f"OUTPUT_DIR: '{'1+' * 4900}1j'", "nested too deeply"),
    "many values": ("A: [" + "1," * 490_000 + "]", "more than 20,000 values$"),
    "long value": ("A: " + "x" * 900_000, "more than 10,000 letters"),
    "large file": ("# " * 600_000, "more than 1,000,000 bytes"),
    "huge number": ("SEED: " + "9" * 5000, "line 1: a number has more than 100 digits"),
    "number in base 60": ("SEED: " + "1:" * 4000 + "1", "more than 100 digits"),
    "no number": ("SEED: !!int x", "line 1: x is no int"),
    "no truth value": ("SEED: !!bool x", "line 1: x is no bool"),
    "key twice": ("MODEL:\n  WEIGHTS: a\n  WEIGHTS: b", "line 3: the key WEIGHTS stands in line 2"),
    "key that is a number": ("1: 2", "line 1: the key 1 is no text"),
    "key that is a list": ("? [1]\n: 2", "line 1: the key that is a list"),
    "unknown key": ("MODEL: {{NOPE: 1}}".format(), "MODEL.NOPE"),
    "value of another type": ("SEED: x", "SEED is x; expected"),
    "value for a node": ("MODEL: 3", "MODEL is 3; expected KEY: VALUE"),
    "text that is no value": ("OUTPUT_DIR: '{[]: 1}'", "unhashable"),
    "version": ("VERSION: 99", "VERSION is 99; expected at most 2"),
    "nothing": ("", "no YAML file of KEY: VALUE"),
    "list": ("- 1", "no YAML file of KEY: VALUE"),
    "two documents": ("A: 1\n---\nB: 1", "line 2: "),
    "no YAML": ("A: [1", "line 1: "),
    "zero byte": ("A: \0", "unacceptable character"),
    "latin-1": (b"SEED: 1\nOUTPUT_DIR: \xe9", "line 2: byte 0xe9 is not UTF-8"),
    "UTF-16": ("SEED: 1".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "pickle": (b"\x80\x04\x95", "line 1: byte 0x80 is not UTF-8"),
    "base by https": ("_BASE_: https://example.org/a.yaml", "is the URL 'https://"),
    "base by http": ("_BASE_: http://example.org/a.yaml", "is the URL 'http://"),
    "base by a handler": ("_BASE_: detectron2://a.yaml", "is the URL 'detectron2://"),
    "base of code": ("_BASE_: lazy.py", r"_BASE_ is 'lazy\.py', which is code"),
    "base that is missing": ("_BASE_: [absent.yaml]", r"absent\.yaml' does not exist"),
    "base that is a folder": ("_BASE_: ..", "is a folder"),
    "base that is a device": ("_BASE_: /dev/zero", "is a device"),
    "base that is a FIFO": ("_BASE_: fifo", "fifo' is a FIFO"),
    "base that is a number": ("_BASE_: 1", "_BASE_ is 1; expected the path"),
    "base of itself": ("_BASE_: mine.yaml", r"based on itself: \S*mine\.yaml -> \S*mine\.yaml;"),
    "base in a circle": ("_BASE_: circle.yaml", "based on itself: .*circle"),
    "bases that multiply": ("_BASE_: [m0.yaml, m0.yaml]", "based on more than 100 files"),
    "call in a base": ("_BASE_: evil.yaml", r"evil\.yaml, line 2: the tag !!python"),
}  # fmt: skip


@pytest.fixture
def mine(attacked) -> Path:
    """A path for a config, beside what it may be based on."""
    call = CALL.format(canary=attacked.parent / "canary")
    os.mkfifo(attacked / "fifo")
    (attacked / "lazy.py").write_text(f"open({str(attacked.parent / 'canary')!r}, 'w')")
    (attacked / "circle.yaml").write_text("_BASE_: mine.yaml")
    (attacked / "evil.yaml").write_text(f"SEED: 1\nOUTPUT_DIR: {call}")
    for i in range(9):
        (attacked / f"m{i}.yaml").write_text(f"_BASE_: [m{i + 1}.yaml, m{i + 1}.yaml]")
    (attacked / "m9.yaml").write_text("SEED: 1")
    return attacked / "mine.yaml"


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_config_is_named_and_runs_nothing(name, mine):
    text, message = TEXTS[name]
    if isinstance(text, str):
        text = text.replace("{canary}", str(mine.parent.parent / "canary")).encode()
    mine.write_bytes(text)
    with pytest.raises(UserError) as raised:
        merged(mine)
    assert str(mine.parent) in str(raised.value)
    assert re.search(message, str(raised.value)), raised.value


@pytest.mark.parametrize("command", ["train", "draw", "fidelity", "anatomy", "benchmark", "ablate"])
def test_no_command_runs_what_a_config_says(command, mine, monkeypatch, capsys):
    config = str(mine.parent / "evil.yaml")
    where = ["--base"] if command == "ablate" else ["--config-file"]
    rest = ["table_3_focal"] if command == "ablate" else []
    monkeypatch.setattr(sys, "argv", ["retina-focal", command, *rest, *where, config])
    with pytest.raises(SystemExit, match=r"evil\.yaml, line 2: the tag !!python"):
        cli.main()


@pytest.mark.parametrize("command", ["train", "draw"])
def test_no_command_reads_the_pickles_that_a_config_names(command, mine, monkeypatch):
    (mine.parent / "p.pkl").write_bytes(pickle.dumps(Canary()))
    files = f"[{mine.parent}/p.pkl]"
    text = f"MODEL: {{LOAD_PROPOSALS: True}}\nDATASETS: {{PROPOSAL_FILES_TRAIN: {files}}}"
    mine.write_text(f"_BASE_: quick_start/bccd.yaml\n{text}")
    monkeypatch.setattr(sys, "argv", ["x", command, "--config-file", str(mine)])
    with pytest.raises(SystemExit, match=r"MODEL\.LOAD_PROPOSALS is True: .*pickles"):
        cli.main()


def test_the_zoo_is_compared_without_running_its_expression(monkeypatch, capsys):
    def refuse(*_) -> None:
        raise AssertionError("yaml.unsafe_load was called")

    monkeypatch.setattr(yaml, "unsafe_load", refuse)
    monkeypatch.setattr(sys, "argv", ["x", "fidelity", str(ZOO / "Base-RetinaNet.yaml")])
    cli.main()
    assert "anchor sizes" not in capsys.readouterr().err


def test_the_expression_is_worth_what_python_makes_of_it():
    (sizes,) = re.findall(r'eval \["(.*)"\]', RETINANET)
    assert re.sub(r"\s", "", sizes) == EXPRESSION
    assert read_yaml(ZOO / "Base-RetinaNet.yaml")["MODEL"]["ANCHOR_GENERATOR"]["SIZES"] == eval(
        sizes
    )


@pytest.mark.parametrize("kind", ["folder", "FIFO"])
def test_a_config_that_is_no_regular_file_is_not_waited_for(kind, mine, monkeypatch, capsys):
    (Path.mkdir if kind == "folder" else os.mkfifo)(mine)
    monkeypatch.setattr(sys, "argv", ["x", "draw", "--config-file", str(mine)])
    with pytest.raises(SystemExit, match=rf"mine\.yaml' is a {kind}"):
        cli.main()


def test_a_base_with_a_long_name_and_an_old_version_are_refused_in_words(tmp_path):
    for text, words in (
        (f"_BASE_: {'a' * 5000}", "_BASE_: .* can't be read"),
        ("VERSION: 1\nMODEL: {WEIGHTS: x}", "VERSION 1 names keys otherwise"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            merge_file(get_cfg(), str(tmp_path / "config.yaml"))
