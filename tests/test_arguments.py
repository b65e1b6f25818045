"""The arguments of the commands: numbers, folders, and who started them."""

import argparse

import pytest

from retina_focal.tools import ablate
from retina_focal.tools.arguments import listed, number, tool_parser


@pytest.mark.parametrize(
    "read, text, value",
    [
        (number(), "1", 1),
        (number(least=0), "0", 0),
        (number(float, 0), "1e7", 1e7),
        (number(float, 0, 1), "1", 1),
        (listed(number()), "160,320", [160, 320]),
        (listed(number(float, 0)), "0.5", [0.5]),
    ],
)
def test_numbers_are_read_as_they_are_typed(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    "read, text, message",
    [
        (number(), "0", "'0' is not a whole number of at least 1"),
        (number(), "1.5", "'1.5' is not a whole number"),
        (number(float, 0), "-0.1", "'-0.1' is not a number of at least 0"),
        (number(float, 0), "nan", "'nan' is not a number"),
        (number(float, 0), "inf", "'inf' is not a number"),
        (number(float, 0, 1), "1.01", "'1.01' is not a number from 0 to 1"),
        (listed(number()), "1,,2", "'' is not a whole number"),
        (listed(number()), "1,two", "'two' is not a whole number"),
    ],
)
def test_what_is_no_such_number_is_refused_in_words(read, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read(text)


def test_a_file_in_place_of_the_output_folder_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    parser = tool_parser("speed", "Speed.", has_folder=True)
    for path in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--output", str(path)])
        assert stop.value.code == 2
        assert (
            f"'{tmp_path / 'file'}' is no folder that you may write to" in capsys.readouterr().err
        )
    for path in (tmp_path, tmp_path / "new" / "folder"):
        assert parser.parse_args(["--output", str(path)]).output == path
    assert not (tmp_path / "new").exists()
    assert str(parser.parse_args([]).output) == "output/speed"


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        {
            **{"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            **{"SLURM_STEP_ID": "0", "SLURM_NODELIST": "a"},
        },
    ],
)
def test_a_command_of_one_process_is_refused_to_launchers(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="started 2 processes, each of which would do all of ret"):
        ablate.main(["hinge"])


def test_in_a_job_of_several_tasks_a_command_without_srun_is_meant(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert tool_parser("ablate", "Ablate.")


@pytest.mark.parametrize("is_option", [True, False])
def test_an_option_behind_the_pairs_is_refused_and_not_taken_for_one(is_option, capsys):
    parser = tool_parser("speed", "Speed.", has_folder=True)
    name = "--opts" if is_option else "opts"
    parser.add_argument(name, nargs=argparse.REMAINDER, default=[])
    before = ["--opts"] if is_option else []
    pairs = [*before, "SEED", "1"]
    assert parser.parse_args(["--output", "x", *pairs]).opts == ["SEED", "1"]
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([*pairs, "--output", "x"])
    assert stop.value.code == 2
    message = f"--output comes after {'--opts' if is_option else 'SEED'} ...; put it before them"
    assert message in capsys.readouterr().err
