"""Break one line of the package at a time: the test that is named for the line must fail.

    OMP_NUM_THREADS=1 python tests/attacks/mutations.py              # all, in minutes
    OMP_NUM_THREADS=1 python tests/attacks/mutations.py margin score # those with these words

Each mutation is made in a copy of the package, in a temporary folder, and its test runs there
alone. It prints the table of docs/TESTS.md, and ends with status 1 where a mutation survives.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# For the processes that are forked for each mutation: detectron2 is imported once.
import detectron2.engine
import detectron2.modeling  # noqa: F401
import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("retina_focal", "configs", "tests", "pyproject.toml", "train_net.py")
FAILED = 1  # pytest's status where a test failed; others say that none was found, or no code ran


class Mutation(NamedTuple):
    """What is broken, and the test that has to notice."""

    name: str
    file: str  # below retina_focal/
    old: str  # stands in it once
    new: str
    test: str  # of tests/: file::function


MUTATIONS = [
    Mutation(
        "matching: a block of boxes forgets the best anchors of the blocks before",
        "matching.py",
        '(ious == best_of_box).view(torch.uint8), "amax")',
        '(ious == best_of_box).view(torch.uint8), "amax", include_self=False)',
        "test_assigner.py::test_a_block_of_boxes_keeps_the_low_quality_matches_of_the_blocks_before",
    ),
    Mutation(
        "matching on the grid: the same",
        "matching.py",
        "        is_best[anchor[iou == best_of_box[box]]] = True",
        "        is_best.zero_()[anchor[iou == best_of_box[box]]] = True",
        "test_assigner.py::test_labels_do_not_depend_on_the_size_of_the_pieces",
    ),
    Mutation(
        "postprocessing: no margin for the rounding of bf16",
        "candidates.py",
        "MARGIN = 0.1",
        "MARGIN = 0.0",
        "test_postprocess.py::test_half_precision_loses_no_score_above_the_threshold",
    ),
    Mutation(
        "postprocessing on a CPU: score >= threshold",
        "candidates.py",
        "(scores > score_thresh).nonzero()",
        "(scores >= score_thresh).nonzero()",
        "test_postprocess.py::test_a_score_equal_to_the_threshold_does_not_pass",
    ),
    Mutation(
        "postprocessing on a device: score >= threshold",
        "postprocess.py",
        "found.scores > self.score_thresh",
        "found.scores >= self.score_thresh",
        "test_postprocess.py::test_a_score_equal_to_the_threshold_does_not_pass",
    ),
    Mutation(
        "AMP: the scale is never updated",
        "training/steps.py",
        "            self.grad_scaler.update()",
        "            pass",
        "test_steps.py::test_mixed_precision_scales_outside_autocast_and_updates_the_scale_after_"
        "each_step",
    ),
    Mutation(
        "AMP: no metrics",
        "training/steps.py",
        "        self._share(losses, data_time)",
        "        self.grad_scaler or self._share(losses, data_time)",
        "test_steps.py::test_mixed_precision_scales_outside_autocast_and_updates_the_scale_after_"
        "each_step",
    ),
    Mutation(
        "AMP: hooks do not see the gradients",
        "training/steps.py",
        "        self.after_backward()",
        "        self.grad_scaler or self.after_backward()",
        "test_steps.py::test_mixed_precision_scales_outside_autocast_and_updates_the_scale_after_"
        "each_step",
    ),
    Mutation(
        "micro-batches: the images of a step are not divided among the processes",
        "training/steps.py",
        "images, reason = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), None",
        "images, reason = cfg.SOLVER.IMS_PER_BATCH, None",
        "test_steps.py::test_a_process_splits_its_own_part_of_the_batch",
    ),
    Mutation(
        "a LazyConfig's run is resumed from iteration 0",
        "training/assembly.py",
        "        if resume and self.start_iter == 0:",
        "        self.start_iter *= not isinstance(self.parts, DictConfig)\n"
        "        if resume and self.start_iter == 0:",
        "test_train.py::test_a_lazy_config_trains_evaluates_and_resumes",
    ),
    Mutation(
        "evaluation: an LVIS dataset is measured as COCO",
        "evaluation/evaluators.py",
        'if evaluator_type == "coco":',
        'if evaluator_type in ("coco", "lvis"):',
        "test_evaluators.py::test_each_type_of_dataset_has_its_own_evaluator",
    ),
    Mutation(
        "registration: another image folder passes under a registered name",
        "data/registration.py",
        "if registered != what:",
        "if registered[0] != what[0]:",
        "test_registration.py::"
        "test_the_same_annotations_with_another_image_folder_are_an_error_naming_both",
    ),
    Mutation(
        "several processes: buffers are broadcast",
        "training/processes.py",
        '"broadcast_buffers": False',
        '"broadcast_buffers": True',
        "test_processes.py::test_each_process_keeps_its_own_moving_average",
    ),
    Mutation(
        "training picture: the ground truth twice",
        "drawing.py",
        "result.pred_boxes[:VIS_MAX_BOXES])",
        'record["instances"].gt_boxes)',
        "test_drop_in.py::test_the_training_picture_shows_ground_truth_above_predictions",
    ),
    Mutation(
        "folding: a convolution with a border that is not zero",
        "folding_timm.py",
        '.padding_mode == "zeros"',
        ".padding_mode",
        "test_folding.py::test_what_a_folded_convolution_cannot_do_stays_as_it_is",
    ),
    Mutation(
        "folding: a convolution and norm that are called twice",
        "folding_timm.py",
        "== times[node.args[0].target] == times[node.target] == 1",
        "== 1",
        "test_folding.py::test_what_a_folded_convolution_cannot_do_stays_as_it_is",
    ),
    Mutation(
        "folding: a convolution whose output something else reads too",
        "folding_timm.py",
        "len(node.args[0].users) == times",
        "times",
        "test_folding.py::test_a_convolution_that_something_else_uses_too_is_not_folded",
    ),
    Mutation(
        "box tower: hooks of the backward pass are not called",
        "box_tower.py",
        ', "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"',
        ', "_forward_hooks"',
        "test_box_tower.py::test_layers_after_the_last_that_needs_whole_maps_run_on_cells",
    ),
    Mutation(
        "box tower: the gathered rows are kept for the gradient",
        "box_tower.py",
        "                    checkpoint(\n",
        "                    (lambda function, *args, **_: function(*args))(\n",
        "test_box_tower.py::test_what_the_gathered_rows_cost_is_not_kept_for_the_gradient",
    ),
    Mutation(
        "dense sum: logits in channels_last are copied",
        "dense_sum.py",
        "x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()",
        "x.contiguous()",
        "test_dense_sum.py::test_neither_memory_format_is_copied",
    ),
    Mutation(
        "trainer: a config for other processes is not scaled",
        "training/assembly.py",
        "self.auto_scale_workers(plain_values(cfg), comm.get_world_size())",
        "plain_values(cfg)",
        "test_assembly.py::test_a_config_for_other_processes_is_scaled_to_these",
    ),
    Mutation(
        "a training step: it enters one function more",
        "padding.py",
        "def size_of_step(",
        "def size_of_step(*args, **kwargs):\n    return _size_of_step(*args, **kwargs)\n\n\n"
        "def _size_of_step(",
        "test_retinanet.py::test_a_training_step_enters_few_functions",
    ),
]


def main() -> None:
    """Make each mutation and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutations whose name has one of these")
    args = parser.parse_args()
    assert "retina_focal" not in sys.modules, "the copy could not be imported"
    sys.dont_write_bytecode = True
    words = [word.lower() for word in args.words] or [""]
    chosen = [x for x in MUTATIONS if any(word in x.name.lower() for word in words)]
    if not chosen:
        sys.exit(f"no mutation has one of the words {args.words} in its name")
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        if status := run(copy, *(mutation.test for mutation in chosen)):
            sys.exit(f"pytest ends with status {status} although nothing is broken")
        print("| mutation | file | test that fails |\n| --- | --- | --- |", flush=True)
        survivors = 0
        for mutation in chosen:
            is_noticed = run_mutated(copy, mutation) == FAILED
            survivors += not is_noticed
            test = f"`{mutation.test.replace('::', '`, `')}`" if is_noticed else "none: it SURVIVES"
            print(f"| {mutation.name} | `{mutation.file}` | {test} |", flush=True)
    sys.exit(survivors > 0)


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """The source with the mutation made."""
    source = (root / "retina_focal" / mutation.file).read_text()
    found = source.count(mutation.old)
    assert found == 1, f"{mutation.file} has {mutation.old!r} {found} times, expected once"
    return source.replace(mutation.old, mutation.new)


def run_mutated(copy: Path, mutation: Mutation) -> int:
    """pytest's status; the copy is then as it was."""
    path = copy / "retina_focal" / mutation.file
    source = path.read_text()
    path.write_text(mutated(mutation, copy))
    try:
        return run(copy, mutation.test)
    finally:
        path.write_text(source)


def run(copy: Path, *tests: str) -> int:
    """pytest's status for these test functions, run in the copy up to the first that fails."""
    child = os.fork()  # which has torch and detectron2 imported
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    files, names = zip(*sorted({tuple(test.split("::")) for test in tests}), strict=True)
    paths = [f"tests/{file}" for file in dict.fromkeys(files)]
    os.chdir(copy)
    sys.path[0] = str(copy)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for processes that a test starts
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *paths, "-k", " or ".join(names)]
    os._exit(pytest.main(arguments))


if __name__ == "__main__":
    main()
