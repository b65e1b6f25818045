"""Laws of ignored regions and of pictures without a box, from the annotations to the loss."""

import json

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_assigner import NUM_CLASSES, instances, retinanet_anchors
from test_criterion import K, case, criterion, sums_by_definition
from test_resume import small

from retina_focal import Assigner, ATSSAssigner, get_cfg
from retina_focal.assigner import IgnoreRegions, build_assigner
from retina_focal.data.loading import TrainLoader, build_train_loader
from retina_focal.data.regions import map_with_regions
from retina_focal.data.registration import register_coco_json
from retina_focal.ground_truth import ground_truth

ANCHORS = retinanet_anchors()
BOX = st.tuples(*[st.floats(0, 200, width=32)] * 2, *[st.floats(1, 200, width=32)] * 2).map(
    lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]
)


def image(boxes, regions) -> Instances:
    regions = Boxes(torch.tensor(regions).reshape(-1, 4))
    record = {"instances": instances(boxes), "ignore_regions": regions}
    return ground_truth([record], NUM_CLASSES, torch.device("cpu"))[0]


@settings(max_examples=15)
@given(boxes=st.lists(BOX, max_size=4), regions=st.lists(BOX, min_size=0, max_size=20))
@pytest.mark.parametrize("rule", ["detectron2", "atss"])
def test_background_of_which_half_lies_in_a_region_is_ignored_and_nothing_else(
    rule, boxes, regions
):
    plain = ATSSAssigner(NUM_CLASSES) if rule == "atss" else Assigner(num_classes=NUM_CLASSES)
    expected, matched = plain(ANCHORS, [instances(boxes)])
    labels, matched_idxs = IgnoreRegions(plain)(ANCHORS, [image(boxes, regions)])
    assert torch.equal(matched_idxs, matched)
    anchors = Boxes.cat(ANCHORS).tensor
    for x0, y0, x1, y1 in regions:
        width = torch.minimum(anchors[:, 2], torch.tensor(x1)) - anchors[:, 0].clamp(min=x0)
        height = torch.minimum(anchors[:, 3], torch.tensor(y1)) - anchors[:, 1].clamp(min=y0)
        share = width.clamp(min=0) * height.clamp(min=0) / Boxes(anchors).area()
        expected[0, (share >= 0.5) & (expected[0] == NUM_CLASSES)] = -1
    assert torch.equal(labels, expected)


def test_half_of_the_anchor_counts_and_not_of_the_region():
    anchors = [Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 21]]))]
    labels, _ = IgnoreRegions(Assigner(num_classes=NUM_CLASSES))(
        anchors, [image([], [[-90.0, -90.0, 10.0, 10.0]])]
    )
    assert labels.tolist() == [[-1, -1, NUM_CLASSES]]


def test_the_config_asks_for_it():
    cfg = get_cfg()
    assert isinstance(build_assigner(cfg), Assigner)
    cfg.MODEL.RETINA_FOCAL.DATA.IGNORE_REGIONS = True
    found = build_assigner(cfg)
    assert isinstance(found, IgnoreRegions) and found.num_classes == found.assigner.num_classes


def test_crowds_get_the_transforms_of_the_boxes_and_leave_instances_as_they_were(data):
    record = {
        "file_name": str(data / "0.png"), "height": 64, "width": 96, "image_id": 0,
        "annotations": [
            {"bbox": [10, 20, 30, 40], "bbox_mode": 1, "category_id": 1, "iscrowd": 0},
            {"bbox": [50, 0, 20, 60], "bbox_mode": 1, "category_id": 0, "iscrowd": 1,
             "segmentation": {"size": [64, 96], "counts": "x"}},
        ],
    }  # fmt: skip
    flip = [T.ResizeShortestEdge(128), T.RandomFlip(1.0)]
    mapper = DatasetMapper(is_train=True, augmentations=flip, image_format="BGR")
    stock, found = mapper(record), map_with_regions(mapper, record)
    assert found["ignore_regions"].tensor.tolist() == [[52.0, 0.0, 92.0, 120.0]]
    ours = found["instances"]
    assert torch.equal(ours.gt_boxes.tensor, stock["instances"].gt_boxes.tensor)
    assert ours.gt_classes.tolist() == stock["instances"].gt_classes.tolist() == [1]
    assert torch.equal(found["image"], stock["image"])
    assert record["annotations"][1]["iscrowd"] == 1  # the record is as it was
    del record["annotations"][1]
    assert "ignore_regions" not in map_with_regions(mapper, record)
    assert map_with_regions(lambda record: None, record) is None


def test_a_region_takes_its_background_out_of_the_loss():
    """To the loss of a model, by the record alone."""
    anchors, logits, deltas, _, _, targets = case()
    regions = [Boxes(torch.tensor([[8.0, 0.0, 64.0, 48.0]]))] * 3
    records = [{"instances": x, "ignore_regions": r} for x, r in zip(targets, regions, strict=True)]
    gt_instances = ground_truth(records, K, torch.device("cpu"))
    labels, matched_idxs = IgnoreRegions(Assigner(num_classes=K))(anchors, gt_instances)
    assert (labels < 0).float().mean() > 0.3
    losses, _ = criterion(normalizer="batch")(
        anchors, logits, deltas, labels, matched_idxs, gt_instances
    )
    cls_sums, box_sums, positives = sums_by_definition(
        anchors, logits, deltas, labels, matched_idxs, targets
    )
    torch.testing.assert_close(losses["loss_cls"], cls_sums.sum() / positives.sum())
    torch.testing.assert_close(losses["loss_box_reg"], box_sums.sum() / positives.sum())


@pytest.fixture
def sparse(data, tmp_path):
    """Of six images the first has no box, the second a crowd alone, the third a box and a crowd."""
    content = json.loads((data / "a.json").read_text())
    boxes = [x for x in content["annotations"] if x["image_id"] != 0]
    for annotation in boxes:
        annotation["iscrowd"] = int(annotation["image_id"] == 1 or annotation["id"] == 6)
    path = tmp_path / "sparse.json"
    path.write_text(json.dumps({**content, "annotations": boxes}))
    register_coco_json(f"sparse {path}", str(path), str(data))
    return f"sparse {path}"


def of_each_picture(loader: TrainLoader) -> dict[int, tuple[int, int]]:
    """Boxes and regions of each picture by its id, over two epochs."""
    samples = [x for batch, _ in zip(loader, range(6), strict=False) for x in batch]
    return {x["image_id"]: (len(x["instances"]), len(x.get("ignore_regions", ()))) for x in samples}


@pytest.mark.parametrize("lazy", [False, True])
def test_the_keys_bring_empty_pictures_and_regions_to_the_model(lazy, sparse, tmp_path):
    cfg = small(tmp_path, sparse)
    source, node = cfg, cfg.MODEL.RETINA_FOCAL
    if lazy:
        mapper = L(DatasetMapper)(is_train=True, augmentations=[], image_format="BGR")
        loader = L(build_detection_train_loader)(
            dataset=L(get_detection_dataset_dicts)(names=sparse),
            mapper=mapper, total_batch_size=2, num_workers=0,
        )  # fmt: skip
        source = OmegaConf.create({"dataloader": {"train": loader}}, flags={"allow_objects": True})
    whole = {3: (2, 0), 4: (2, 0), 5: (2, 0)}
    assert of_each_picture(build_train_loader(source, 1, node)) == {2: (1, 0), **whole}
    node.DATA.KEEP_EMPTY = True
    loader = build_train_loader(source, 1, node)
    assert of_each_picture(loader) == {0: (0, 0), 1: (0, 0), 2: (1, 0), **whole}
    node.DATA.IGNORE_REGIONS = True
    loader = build_train_loader(source, 1, node)
    assert of_each_picture(loader) == {0: (0, 0), 1: (0, 2), 2: (1, 1), **whole}
