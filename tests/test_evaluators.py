"""The evaluator is that of the dataset's type."""

import pytest
from detectron2.data import MetadataCatalog

from retina_focal.errors import UserError
from retina_focal.evaluation import evaluators


@pytest.fixture
def dataset():
    yield MetadataCatalog.get("typed")
    MetadataCatalog.remove("typed")


@pytest.mark.parametrize(
    ("evaluator_type", "name"),
    [
        ("coco", "COCOEvaluator"),
        ("lvis", "LVISEvaluator"),
        ("pascal_voc", "PascalVOCDetectionEvaluator"),
    ],
)
def test_each_type_of_dataset_has_its_own_evaluator(dataset, evaluator_type, name, monkeypatch):
    dataset.evaluator_type = evaluator_type
    for each in ("COCOEvaluator", "LVISEvaluator", "PascalVOCDetectionEvaluator"):
        monkeypatch.setattr(
            evaluators, each, lambda *args, each=each, **options: (each, args, options)
        )
    output = {} if evaluator_type == "pascal_voc" else {"output_dir": "out"}
    assert evaluators.build_evaluator("typed", "out") == (name, ("typed",), output)


def test_a_type_without_an_evaluator_is_refused_in_words(dataset):
    dataset.evaluator_type = "sem_seg"
    with pytest.raises(UserError, match="'typed' has evaluator_type 'sem_seg'; expected coco"):
        evaluators.build_evaluator("typed", "out")
