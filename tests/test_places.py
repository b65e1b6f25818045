"""Laws of places: one anchor has one name in maps, labels and flattened maps."""

import torch

from retina_focal.places import Places, places_of_elements


def test_a_place_names_the_same_anchor_in_maps_and_in_labels():
    images, anchors, channels, height, width = 2, 3, 4, 5, 6
    # Every value tells its own coordinates.
    number = torch.arange(images * anchors * height * width).view(images, anchors, height, width)
    level = torch.stack([number * 10 + c for c in range(channels)], 2).flatten(1, 2)
    labels = number.permute(0, 2, 3, 1)
    place = Places(*(torch.tensor(x) for x in ([1, 0], [2, 0], [4, 1], [0, 5])))
    expected = number[1, 2, 4, 0], number[0, 0, 1, 5]
    numbers = place.numbers(anchors, (height, width))
    assert labels.flatten(1)[place.image, numbers].tolist() == list(expected)
    assert place.of_map(level, channels).tolist() == [
        [10 * n + c for c in range(channels)] for n in expected
    ]


def test_elements_of_a_flattened_map_are_told_apart():
    shape = 3, 4, 5, 6  # anchors, channels, rows, columns
    index = torch.arange(3 * 4 * 5 * 6)
    found = places_of_elements(index, 4, 5 * 6, 6)
    for coordinate, expected in zip(found, torch.unravel_index(index, shape), strict=True):
        assert torch.equal(coordinate, expected)
