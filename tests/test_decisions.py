"""What a fingerprint and a pace decide, as laws."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from retina_focal.config import flatten, get_cfg
from retina_focal.data.coverage import BoxTable
from retina_focal.data.decisions import (
    data_settings,
    input_settings,
    machine_settings,
    method_settings,
    threshold_settings,
)
from retina_focal.data.fingerprint import (
    GRAIN,
    LEAST_SIDE,
    SHORTEST,
    SMALL_SIDE,
    SPENT,
    TILE,
    Fingerprint,
    Machine,
    Pace,
    affordable_shorter,
    enough_steps,
    fingerprint,
    is_tiled,
    padded_side,
    steps_within,
    wanted_shorter,
)
from retina_focal.data.schedule import RATE_PER_PICTURE, schedule_settings
from retina_focal.errors import UserError

CELLS = Fingerprint(
    classes=("Platelets", "RBC", "WBC"),
    boxes_of_class=(209, 2382, 214),
    pictures_of_class=(117, 193, 198),
    num_pictures=205,
    num_empty=3,
    num_val=87,
    shorter=480.0,
    aspect=1.33,
    small=32.0,
    most_boxes=28,
    most_in_tile=28,
    num_tiles=205,
    most_pixels=480 * 640,
    overlap=0.46,
)
CPU = Machine(has_gpu=False, cores=2)
# A step of 4 pictures of the quick start, idle.
PACE = Pace(shorter=320, batch=4, start=20.0, step=0.57, picture=0.1, save=0.4)


def decided(found: Fingerprint = CELLS, minutes: float = 8.0, pace: Pace = PACE, machine=CPU):
    """Shorter side and the values that are decided for it."""
    shorter = affordable_shorter(found, pace, minutes)
    inputs, sides, _ = input_settings(found, pace, minutes, shorter)
    schedule = schedule_settings(found, machine, replace(pace, step=pace.step), minutes, sides)
    return shorter, {key: x.value for key, x in {**inputs, **schedule}.items()}


def test_a_fingerprint_counts_what_is_there():
    boxes = [[0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 40, 40], [50, 50, 50, 60], [0, 0, 10, 10]]
    table = BoxTable(
        np.array(boxes, float),
        np.array([0, 0, 1, 1, 0]),
        np.array([0, 0, 0, 0, 2]),
        np.array([[100, 200], [300, 100], [100, 100]]),
        ("a", "b", "c"),
    )
    found = fingerprint(table, ["x", "y", "none"], num_val=7)
    assert found.boxes_of_class == (3, 1, 0) and found.pictures_of_class == (2, 1, 0)
    assert (found.num_pictures, found.num_empty, found.num_val) == (3, 1, 7)
    assert found.shorter == 100 and found.most_boxes == 3
    assert found.most_in_tile == 3 and found.num_tiles == 3
    assert found.small == pytest.approx(10)  # no class has ten boxes: all boxes decide
    # 50 of 150 px of the first two; the box of another class in the same place does not count.
    assert 0.3 < found.overlap <= 1 / 3 + 1e-6
    # Of a picture of 700 x 1,900 px three boxes lie in one tile, a fourth does not.
    large = replace(table, sizes=np.array([[700, 1900]] * 3))
    apart = np.array([*boxes[:4], [1200.0, 0, 1210, 10]])
    large = replace(large, boxes=apart, pictures=np.zeros(5, int))
    large = fingerprint(large, ["x", "y", "none"], num_val=7)
    assert large.most_in_tile == 3 and large.num_tiles == 3 * 2 * 3
    many = replace_boxes(table, 12)
    assert fingerprint(many, ["x", "y", "none"], 7).small == pytest.approx(4)


def replace_boxes(table: BoxTable, count: int) -> BoxTable:
    """The table with `count` boxes of 4 px and of 40 px, of a class each."""
    sides = np.repeat([4.0, 40.0], count)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], 1)
    classes = np.repeat([1, 0], count)
    return replace(table, boxes=boxes, classes=classes, pictures=np.zeros(2 * count, int))


def test_without_a_box_that_has_an_area_there_is_nothing_to_learn():
    boxes = np.array([[5.0, 5, 5, 9]])
    table = BoxTable(boxes, np.array([0]), np.array([0]), np.array([[9, 9]]), ("a",))
    with pytest.raises(UserError, match="nothing to learn from"):
        fingerprint(table, ["x"], 1)


def test_small_objects_want_larger_pictures_up_to_what_there_is_to_see():
    assert wanted_shorter(CELLS) == 480  # 32 px as they are
    assert wanted_shorter(replace(CELLS, small=64.0)) == 256
    assert wanted_shorter(replace(CELLS, small=400.0)) == SHORTEST
    assert wanted_shorter(replace(CELLS, small=16.0)) == 736  # not 960: 1.5 times, as multiples
    for small in (8.0, 20.0, 50.0):
        assert wanted_shorter(replace(CELLS, small=small)) % GRAIN == 0


def test_pictures_are_enlarged_where_there_are_many_steps():
    few = replace(CELLS, small=16.0, num_pictures=35)
    sizes = {minutes: affordable_shorter(few, PACE, minutes) for minutes in range(4, 40)}
    assert {480, 512, 736} <= set(sizes.values())
    for minutes, side in sizes.items():
        assert steps_within(few, PACE, minutes, side) >= (500 if side > 480 else 250)
        larger = steps_within(few, PACE, minutes, side + GRAIN)
        assert side == 736 or larger < (500 if side >= 480 else 250)


def test_more_minutes_give_larger_pictures_and_then_more_steps():
    sizes, steps = [], []
    for minutes in (2, 4, 8, 16, 32, 64):
        shorter, values = decided(minutes=minutes)
        sizes.append(shorter)
        steps.append(values["SOLVER.MAX_ITER"])
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == wanted_shorter(CELLS)
    assert steps[-1] > steps[0]
    # The hand-made config of the quick start: 320 px and 800 steps, without evaluations.
    shorter, values = decided(minutes=8)
    assert shorter == 320 and 600 < values["SOLVER.MAX_ITER"] < 800


@pytest.mark.parametrize("minutes", [3, 8, 30, 100])
@pytest.mark.parametrize("num_val", [10, 87, 2000])
def test_steps_evaluations_and_start_take_the_minutes_and_no_more(minutes, num_val):
    found = replace(CELLS, num_val=num_val)
    shorter = affordable_shorter(found, PACE, minutes)
    _, sides, _ = input_settings(found, PACE, minutes, shorter)
    values = schedule_settings(found, CPU, PACE, minutes, sides)
    steps, period = values["SOLVER.MAX_ITER"].value, values["TEST.EVAL_PERIOD"].value
    times = 1 + (-(-steps // period) - 1 if period else 0)
    # A batch is as large as the largest of its pictures.
    step = np.mean([PACE.step_at(max(x)) for x in itertools.product(sides, repeat=PACE.batch)])
    picture = PACE.picture_at(shorter)
    # One at the end is measured with the start; each evaluation may be the best, and is saved.
    saves = -(-steps // values["SOLVER.CHECKPOINT_PERIOD"].value) - 1 + times
    seconds = PACE.start + steps * step + times * num_val * picture + saves * PACE.save
    most = SPENT * minutes * 60
    epochs = steps * 4 / found.num_pictures
    assert seconds <= most + 1
    assert seconds > 0.97 * most or epochs >= 149


@pytest.mark.parametrize("shorter", range(SHORTEST, 640, GRAIN))
def test_an_evaluation_is_timed_at_the_size_of_test(shorter):
    inputs, sides, _ = input_settings(CELLS, PACE, 200, shorter)
    assert inputs["INPUT.MIN_SIZE_TEST"].value == shorter and len(sides) > 1
    reason = schedule_settings(CELLS, CPU, PACE, 200, sides)["TEST.EVAL_PERIOD"].reason
    assert f": {CELLS.num_val * PACE.picture_at(shorter):.0f} s each" in reason


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("sides", [[320], [320, 480], [480, 320, 800, 352]])
def test_a_batch_of_several_sizes_is_padded_to_the_largest(sides, batch):
    squares = [max(x) ** 2 for x in itertools.product(sides, repeat=batch)]
    assert padded_side(sides, batch) == pytest.approx(np.sqrt(np.mean(squares)))


def test_too_few_minutes_are_refused_with_those_that_suffice():
    slow = replace(PACE, step=60.0)
    with pytest.raises(UserError, match=r"type --minutes (\d+)") as error:
        schedule_settings(CELLS, CPU, slow, 3, [320])
    minutes = int(str(error.value).rsplit(" ", 1)[1])
    assert schedule_settings(CELLS, CPU, slow, minutes, [320])["SOLVER.MAX_ITER"].value >= 50


def test_the_learning_rate_follows_the_batch():
    for batch in (1, 2, 4, 8):
        _, values = decided(pace=replace(PACE, batch=batch), minutes=30)
        assert values["SOLVER.IMS_PER_BATCH"] == batch
        assert values["SOLVER.BASE_LR"] == pytest.approx(batch * RATE_PER_PICTURE)
    assert decided()[1]["SOLVER.BASE_LR"] == 0.02  # configs/quick_start
    values = decided(pace=replace(PACE, batch=16), machine=Machine(True, 16), minutes=60)[1]
    assert values["SOLVER.BASE_LR"] == 0.01  # detectron2's


@pytest.mark.parametrize(
    ("minutes", "expected"), [(1, "third"), (3, "least"), (8, "eighth"), (60, "eighth")]
)
def test_the_learning_rate_rises_slowly_enough(minutes, expected):
    values = decided(minutes=minutes)[1]
    steps, warmup = values["SOLVER.MAX_ITER"], values["SOLVER.WARMUP_ITERS"]
    assert warmup == {"third": steps // 3, "least": 80, "eighth": steps // 8}[expected]


def test_several_sizes_are_for_many_epochs():
    assert decided(minutes=8)[1]["INPUT.MIN_SIZE_TRAIN"] == [320]
    sizes = decided(minutes=40)[1]["INPUT.MIN_SIZE_TRAIN"]
    assert len(sizes) > 3 and min(sizes) < 480 < max(sizes)


def test_a_rare_class_is_shown_more_often_and_is_named():
    common = data_settings(CELLS)
    assert common["DATALOADER.SAMPLER_TRAIN"].value == "TrainingSampler"
    rare = data_settings(replace(CELLS, pictures_of_class=(4, 193, 198)))
    sampler = rare["DATALOADER.SAMPLER_TRAIN"]
    assert sampler.value == "RepeatFactorTrainingSampler" and "'Platelets'" in sampler.reason
    assert rare["DATALOADER.REPEAT_THRESHOLD"].value == 0.1
    one = replace(CELLS, classes=("x",), boxes_of_class=(9,), pictures_of_class=(1,))
    assert data_settings(one)["DATALOADER.SAMPLER_TRAIN"].value == "TrainingSampler"
    # A class without boxes is not rare, it is not there.
    empty = replace(CELLS, pictures_of_class=(0, 193, 198))
    assert data_settings(empty)["DATALOADER.SAMPLER_TRAIN"].value == "TrainingSampler"


def test_the_data_tell_classes_background_detections_and_nms():
    values = data_settings(replace(CELLS, most_boxes=250, overlap=0.02))
    assert values["MODEL.RETINANET.NUM_CLASSES"].value == 3
    assert values["DATALOADER.FILTER_EMPTY_ANNOTATIONS"].value is False
    assert values["TEST.DETECTIONS_PER_IMAGE"].value == 400
    assert values["MODEL.RETINANET.NMS_THRESH_TEST"].value == 0.3
    assert data_settings(CELLS)["MODEL.RETINANET.NMS_THRESH_TEST"].value == 0.6
    assert data_settings(CELLS)["TEST.DETECTIONS_PER_IMAGE"].value == 100


@pytest.mark.parametrize("changed", [{}, {"save": 3.0}, {"picture": 2.0}])
def test_the_minutes_that_are_asked_for_are_the_fewest_whole_ones(changed):
    pace = replace(PACE, step=3.0, **changed)
    with pytest.raises(UserError, match="type --minutes") as error:
        decided(minutes=1, pace=pace)
    minutes = int(str(error.value).rpartition(" ")[2])
    assert decided(minutes=minutes, pace=pace)[1]["SOLVER.MAX_ITER"] >= 50
    with pytest.raises(UserError, match=f"type --minutes {minutes}"):
        decided(minutes=minutes - 1, pace=pace)


def test_large_pictures_of_small_objects_are_cut():
    slide = replace(CELLS, shorter=12_000.0, aspect=1.0, small=20.0)
    assert is_tiled(slide) and wanted_shorter(slide) == TILE
    shorter, values = decided(slide, minutes=30)
    assert shorter == TILE
    assert values["INPUT.CROP.ENABLED"] is True and values["INPUT.CROP.SIZE"] == [TILE, TILE]
    assert values["MODEL.RETINA_FOCAL.TEST.TILE"] == TILE
    assert "DATASETS.TEST" not in values and values["TEST.EVAL_PERIOD"] > 0  # val is cut too
    assert values["MODEL.RETINA_FOCAL.TRAIN.BEST"] == "bbox/AP"
    detections = data_settings(replace(slide, most_boxes=9000, most_in_tile=110))
    assert detections["TEST.DETECTIONS_PER_IMAGE"] == (
        200,
        "a tile has up to about 110 boxes",
    )
    # An epoch is of tiles: few pictures are learned from for as long as the minutes last.
    few = replace(slide, num_pictures=3, num_val=1, num_tiles=1200)
    assert decided(few, minutes=600)[1]["SOLVER.MAX_ITER"] == 150 * 1200 / 4
    key = "MODEL.RETINA_FOCAL.TEST.EVALUATOR"
    assert machine_settings(replace(CPU, has_hotcoco=True), slide)[key].value == "hotcoco"
    assert key not in machine_settings(CPU, slide)
    assert key not in machine_settings(replace(CPU, has_hotcoco=True), CELLS)
    # Nothing is gained by cutting where objects are small in the picture itself, or large.
    assert not is_tiled(replace(CELLS, small=4.0))
    limit = "MODEL.RETINA_FOCAL.DATA.MAX_PIXELS"
    assert limit not in values
    assert decided(replace(slide, most_pixels=10**8), minutes=30)[1][limit] == 10**8
    assert not is_tiled(replace(slide, small=200.0))


def test_what_nothing_has_shown_to_help_is_as_stock():
    stock = flatten(get_cfg())
    for key, setting in method_settings().items():
        assert setting.value == stock[key] or "AP" in setting.reason


def test_anchors_that_reach_nearly_all_boxes_are_positive_from_a_higher_iou_on():
    thresholds = [
        threshold_settings(x)["MODEL.RETINANET.IOU_THRESHOLDS"].value for x in (0.84, 0.97, 1.0)
    ]
    assert thresholds == [[0.4, 0.5], [0.5, 0.6], [0.5, 0.6]]


def test_weights_are_averaged_over_an_eighth_of_the_steps():
    values = decided()[1]
    steps, decay = values["SOLVER.MAX_ITER"], values["MODEL.RETINA_FOCAL.TRAIN.EMA"]
    assert 1 / (1 - decay) == pytest.approx(steps / 8, rel=0.01)


def boxes_of(ratio=1.0, shift=0.0, growth=0.0) -> BoxTable:
    """400 boxes of a class, by width over height, place and growth from the top to the bottom."""
    random = np.random.default_rng(0)
    x, y = random.uniform(60, 340, (2, 400))
    size = 20 * np.exp(random.normal(0, 0.3, 400) + growth * (y / 400 - 0.5))
    half = np.stack([size * ratio**0.5, size / ratio**0.5], 1) / 2
    centres = np.stack([x, y + shift * 400], 1)
    sizes = np.full((400, 2), 400)
    return BoxTable(
        np.hstack([centres - half, centres + half]),
        np.zeros(400, int), np.arange(400), sizes, ("",) * 400,
    )  # fmt: skip


def test_pictures_without_an_up_are_turned_upside_down_too():
    key = "MODEL.RETINA_FOCAL.TRAIN.AUGMENT.VERTICAL_FLIP"
    flips = {}
    changes = {"ratio": 0.7, "shift": 0.05, "growth": 1.0}
    for name, change in [("", 0), *changes.items()]:
        found = fingerprint(boxes_of(**{name: change} if name else {}), ("x",), 5)
        flips[name] = schedule_settings(found, CPU, PACE, 30, [320])[key].value
        assert schedule_settings(found, CPU, PACE, 3, [320])[key].value == 0.0  # too few steps
    assert flips == {"": 0.5, "ratio": 0.0, "shift": 0.0, "growth": 0.0}


def test_every_setting_has_a_reason():
    inputs, sides, _ = input_settings(CELLS, PACE, 8, 320)
    every = {**data_settings(CELLS), **inputs, **machine_settings(CPU, CELLS)}
    every |= {**schedule_settings(CELLS, CPU, PACE, 8, sides), **method_settings()}
    every |= threshold_settings(1.0)
    assert all(setting.reason and "\n" not in setting.reason for setting in every.values())
    assert LEAST_SIDE < SMALL_SIDE
    assert enough_steps(replace(CELLS, num_pictures=10), 4) == 250
