"""A config takes no key and no type of value that it does not have."""

import pytest

from retina_focal.config import get_cfg
from retina_focal.errors import UserError
from retina_focal.merging import merge_file, merge_options


@pytest.mark.parametrize("node", ["TRAIN", "DATA", "TEST"])
def test_an_unknown_key_of_a_node_is_refused(node, tmp_path):
    with pytest.raises(UserError, match=f"no key 'MODEL.RETINA_FOCAL.{node}.NOPE'"):
        merge_options(get_cfg(), [f"MODEL.RETINA_FOCAL.{node}.NOPE", "1"])
    path = tmp_path / "config.yaml"
    path.write_text(f"MODEL: {{RETINA_FOCAL: {{{node}: {{NOPE: 1}}}}}}")
    with pytest.raises(UserError, match=rf"{node}\.NOPE"):
        merge_file(get_cfg(), str(path))


@pytest.mark.parametrize(
    "text, near",
    [
        ("SOLVER: {MAX_ITR: 1}", "near it: SOLVER.MAX_ITER"),
        ("SOLVR: {MAX_ITER: 1}", "near it: SOLVER"),
        ("MODEL: {RETINA_FOCUS: {HEAD: x}}", "near it: MODEL.RETINA_FOCAL"),
    ],
)
def test_a_slip_in_a_key_of_a_file_is_answered_with_the_keys_near_it(text, near, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"config.yaml: there is no key .*{near}"):
        merge_file(get_cfg(), str(path))


def test_a_version_of_other_names_is_told_of(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("VERSION: 1\nSOLVER: {MAX_ITR: 1}")
    with pytest.raises(UserError, match=r"config.yaml: VERSION 1 .* no 'SOLVER.MAX_ITR'; leave"):
        merge_file(get_cfg(), str(path))


def test_a_value_of_another_type_is_answered_with_one_of_the_right_type(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("SOLVER: {BASE_LR: 1}")
    with pytest.raises(UserError, match=r"SOLVER\.BASE_LR is 1; expected, for example, 0\.001"):
        merge_file(get_cfg(), str(path))
