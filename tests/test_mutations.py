"""tests/attacks/mutations.py stays true: each mutation can be made, and its test is there."""

import pytest
from attacks.mutations import MUTATIONS, ROOT, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda x: x.name)
def test_a_mutation_can_be_made_and_its_test_is_there(mutation):
    compile(mutated(mutation), mutation.file, "exec")
    file, name = mutation.test.split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()
