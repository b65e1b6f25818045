"""Tables, figures and origins of the reports."""

import shlex
from datetime import datetime

import cv2
import pytest
import torch
from conftest import table_rows

from retina_focal.tools.reports import figure, origin, table


def test_a_table_keeps_its_cells_as_they_are_and_aligns_them():
    text = table(["name", "AP"], [["a", "1.0"], ["longer", ""], ["b", 12]])
    heads, rule, *rows = table_rows(text)
    assert heads == ["name", "AP"] and set("".join(rule)) == {":", "-"}
    assert rows == [["a", "1.0"], ["longer", ""], ["b", "12"]]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_a_figure_is_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.png"
    with figure(path, 2, 1) as drawn:
        drawn.add_subplot().plot([0, 1])
    assert cv2.imread(str(path)).shape == (120, 240, 3)
    content = path.read_bytes()
    with pytest.raises(ZeroDivisionError), figure(path, 2, 1):
        1 / 0  # noqa: B018
    assert path.read_bytes() == content


def test_an_origin_names_a_command_that_can_be_typed_again():
    argv = ["--output", "my folder", "DATASETS.TEST", "('a',)"]
    found = origin("speed", argv, "cpu")
    assert shlex.split(found["command"]) == ["retina-focal", "speed", *argv]
    assert datetime.fromisoformat(found["date"]).tzinfo
    assert found["processor"] and found["threads"] == torch.get_num_threads()


@pytest.mark.filterwarnings("error")
def test_texts_of_an_svg_stay_what_they_are(tmp_path):
    with figure(tmp_path / "a.svg", 3, 2) as drawn:
        drawn.subplots().set(xlabel="红细胞 $a$ <b>")
    assert "红细胞 $a$ &lt;b&gt;</text>" in (tmp_path / "a.svg").read_text()
