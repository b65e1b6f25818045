"""The size of a step's images against detectron2's own."""

import torch
from detectron2.structures import ImageList
from hypothesis import given
from hypothesis import strategies as st

from retina_focal.padding import size_of_step

LENGTH = st.integers(1, 200)
CONSTRAINTS = st.none() | st.fixed_dictionaries(
    {}, optional={"square_size": st.integers(0, 300), "size_divisibility": st.integers(0, 64)}
)


@given(st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=4), st.integers(0, 64), CONSTRAINTS)
def test_the_size_is_that_of_detectron2(sizes, divisibility, constraints):
    square = (constraints or {}).get("square_size", 0)
    if square:  # detectron2 then cuts what is larger
        sizes = [(min(height, square), min(width, square)) for height, width in sizes]
    images = [torch.empty(3, *size) for size in sizes]
    expected = ImageList.from_tensors(images, divisibility, padding_constraints=constraints)
    found = size_of_step(sizes, divisibility, constraints, of_all_processes=False)
    assert found == expected.tensor.shape[-2:]
