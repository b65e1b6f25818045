"""Pictures of a training: what was to be found, and what is."""

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances

# Highest-scoring predictions drawn beside the ground truth every VIS_PERIOD iterations.
VIS_MAX_BOXES = 20


def draw_training(record: dict, result: Instances, input_format: str) -> tuple[str, np.ndarray]:
    """Name and (3, 2H, W) uint8 picture: ground truth above the highest-scoring predictions."""
    from detectron2.utils.visualizer import Visualizer

    image = convert_image_to_rgb(record["image"].permute(1, 2, 0), input_format)
    panels = [
        Visualizer(image, None).overlay_instances(boxes=boxes.tensor.detach().cpu().numpy())
        for boxes in (record["instances"].gt_boxes, result.pred_boxes[:VIS_MAX_BOXES])
    ]
    picture = np.vstack([panel.get_image() for panel in panels])
    name = f"Top: ground truth; bottom: {VIS_MAX_BOXES} highest-scoring predictions"
    return name, picture.transpose(2, 0, 1)
