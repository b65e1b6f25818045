"""Results that a config expects, by ``TEST.EXPECTED_RESULTS``."""

import logging
from collections.abc import Mapping, Sequence

from detectron2.evaluation.testing import flatten_results_dict

from retina_focal.errors import UserError

logger = logging.getLogger(__name__)


def unexpected_results(
    expected: Sequence[tuple[str, str, float, float]], results: Mapping[str, object]
) -> UserError | None:
    """What to raise where not all is as expected; None, with a line that says so, where all is.

    Unlike detectron2's `verify_results` it raises nothing for what was not measured, and takes
    the results of several datasets.

    Args:
        expected: rows of [task, metric, value, tolerance]: ["bbox", "AP", 38.5, 0.2]; with several
            datasets the task is "NAME/bbox".
        results: {"bbox": {"AP": ...}}, or such a dict for each dataset.
    """
    found, wrong = flatten_results_dict(results), []
    for task, metric, value, tolerance in expected:
        name = f"{task}/{metric}"
        if name not in found:
            known = ", ".join(list(found)[:10]) or "none"
            wrong.append(f"{name} was not measured (measured: {known})")
        elif not abs(found[name] - value) <= tolerance:  # NaN is not
            wrong.append(f"{name} is {found[name]:.4g}, expected {value:g} within {tolerance:g}")
    if wrong:
        return UserError(f"TEST.EXPECTED_RESULTS: {'; '.join(wrong)}")
    logger.info("results are within the tolerances of TEST.EXPECTED_RESULTS")
    return None
