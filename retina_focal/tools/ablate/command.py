"""Tables of the paper, or any grid of keys, on one's own data: `retina-focal ablate`."""

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import yaml
from tqdm import tqdm

from retina_focal.data.registration import use_datasets
from retina_focal.errors import UserError
from retina_focal.files import write_whole
from retina_focal.tools.ablate import report
from retina_focal.tools.ablate.runs import (
    Run,
    execute,
    grid_rows,
    iterations_done,
    plan,
    read_row,
    row_names,
)
from retina_focal.tools.arguments import add_dataset_argument, listed, number, tool_parser
from retina_focal.tools.common import command

POLL_SECONDS = 1.0
EPILOG = """
A row is a name in configs/ablations (a pattern such as 'table_1a_*' is several) or a YAML file.
With --base its own keys are merged onto that config; without, the file runs as it is: the paper's
setting. Finished runs are in the results file and are never repeated; a run that was stopped goes
on from its last checkpoint. Rows that come to the same settings share their runs.

Examples:
  %(prog)s 'table_1b_*' --base quick_start/bccd.yaml --iterations 250 --jobs 2
  %(prog)s --base mine.yaml --grid MODEL.RETINANET.FOCAL_LOSS_GAMMA=0,1,2 \\
    --grid MODEL.RETINANET.FOCAL_LOSS_ALPHA=0.25,0.5,0.75 --seeds 1,2,3
  %(prog)s 'table_1d_*' --cluster slurm --cluster-option slurm_partition=gpu \\
    --cluster-option gpus_per_node=1 --cluster-option timeout_min=1440
"""


Submit = Callable[[Run], Future]  # or a job of submitit, which has `done` and `result` too


@command
def main(argv: list[str]) -> None:
    """``retina-focal ablate``: run what is not in the results file yet, then write the tables."""
    args = parse_args(argv)
    rows = [read_row(name) for pattern in args.rows for name in row_names(pattern)]
    rows += grid_rows(dict(args.grid)) if args.grid else []
    if len({row.name for row in rows}) < len(rows):
        raise UserError("a row is given twice; give each row once, repetitions by --seeds")
    iterations = ["SOLVER.MAX_ITER", str(args.iterations)] if args.iterations else []
    opts = [*args.opts, *iterations]
    planned = plan(rows, args.base, opts, args.dataset, args.seeds, args.output)
    for cfg in (runs[0].cfg for runs in planned.values()):
        # Before hours of training rather than between them.
        use_datasets(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    results = load_results(args.results)
    submit = launcher(args)
    runs = {(run.settings, run.seed): run for runs in planned.values() for run in runs}
    waiting = [run for key, run in runs.items() if key not in results]
    failures: dict[Run, str] = {}
    try:
        run_all(waiting, submit, args.jobs or len(waiting), partial(record, args.results), failures)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
    found = report.by_row(planned, load_results(args.results).values())
    print(report.write(rows, found, args.output))
    print(f"results: {args.results}; table and plot: {args.output}")
    for run, error in failures.items():
        print(f"{run.name}, seed {run.seed} failed: {error}; see {run.folder / 'output.txt'}")
    if failures:
        raise SystemExit(1)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = tool_parser("ablate", __doc__, EPILOG, has_folder=True)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="name, pattern or YAML file")
    parser.add_argument("--base", metavar="CFG", help="config that the rows' keys are merged onto")
    several = partial(parser.add_argument, action="append", default=[])
    grid = {"type": partial(_assignment, is_list=True), "metavar": "KEY=V,V"}
    several("--grid", **grid, help="values of a key; may be repeated: all combinations")
    add_dataset_argument(parser)
    parser.add_argument("--iterations", type=number(), metavar="N", help="default: the config's")
    seeds = {"type": listed(number(least=0)), "default": [1], "metavar": "1,2,3"}
    parser.add_argument("--seeds", **seeds, help="default: 1")
    jobs = "runs side by side, each with its part of the cores; default: 1, on slurm all"
    parser.add_argument("--jobs", type=number(), metavar="N", help=jobs)
    parser.add_argument("--cluster", choices=["local", "slurm"], help="run through submitit")
    option = {"type": _assignment, "metavar": "NAME=VALUE"}
    several("--cluster-option", **option, help="parameter of submitit's executor; may be repeated")
    results = "default: results.json in the output folder"
    parser.add_argument("--results", type=Path, metavar="FILE", help=results)
    pairs = {"nargs": argparse.REMAINDER, "default": []}
    parser.add_argument("--opts", **pairs, help="KEY VALUE pairs for every run")
    args = parser.parse_args(argv)
    if not args.rows and not args.grid:
        parser.error("nothing to run; name rows, such as 'table_1b_*', or give --grid KEY=V,V")
    if args.grid and not args.base:
        parser.error("--grid needs --base CFG, the config that it varies")
    if len(dict(args.grid)) < len(args.grid):
        keys = ", ".join(key for key, _ in args.grid)
        parser.error(f"--grid has the keys {keys}; give each key once, with all of its values")
    if args.cluster_option and not args.cluster:
        parser.error("--cluster-option needs --cluster local or slurm")
    args.results = args.results or args.output / "results.json"
    args.jobs = args.jobs or (None if args.cluster == "slurm" else 1)
    return args


def run_all(
    runs: Sequence[Run],
    submit: Submit,
    jobs: int,
    record: Callable[[Run, dict], None],
    failures: dict[Run, str],
) -> None:
    """Run all, `jobs` at a time, with one progress line; what fails does not stop the others."""
    waiting, running = deque(runs), {}
    total = sum(run.cfg.SOLVER.MAX_ITER for run in runs)
    finished = 0
    with tqdm(total=total, unit="it", smoothing=0.05, disable=not runs) as progress:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                running[run] = submit(run)
            for run, job in list(running.items()):
                if not job.done():
                    continue
                del running[run]
                finished += run.cfg.SOLVER.MAX_ITER
                try:
                    record(run, job.result())
                except Exception as error:  # whatever the run, or the cluster, raised
                    failures[run] = str(error) or type(error).__name__
            progress.n = min(finished + sum(map(iterations_done, running)), total)
            done = len(runs) - len(waiting) - len(running)
            names = ", ".join(run.name for run in running)
            progress.set_description(f"{done}/{len(runs)} runs; {names}", refresh=True)
            if running:
                time.sleep(POLL_SECONDS)


def launcher(args: argparse.Namespace) -> Submit:
    """What starts a run: a process of this machine, or a job of submitit."""
    if not args.cluster:
        return partial(_start_process, threads=max(1, (os.cpu_count() or 1) // args.jobs))
    try:
        import submitit

        executor = submitit.AutoExecutor(folder=args.output / "jobs", cluster=args.cluster)
        executor.update_parameters(name="ablate", **dict(args.cluster_option))
    except ImportError as error:
        raise UserError(
            "--cluster needs submitit, which is not installed; type: pip install submitit"
        ) from error
    except (AssertionError, NameError, RuntimeError) as error:  # what it refuses options with
        raise UserError(
            f"submitit refuses --cluster {args.cluster} with the options "
            f"{dict(args.cluster_option)}: {str(error).splitlines()[0]}"
        ) from error
    return lambda run: executor.submit(execute, run.cfg.dump())


def _start_process(run: Run, threads: int) -> Future:
    # A process per run: what it leaves in memory, or its crash, is its own.
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_end_with_parent)
    job = pool.submit(execute, run.cfg.dump(), threads)
    pool.shutdown(wait=False)
    return job


def _end_with_parent() -> None:
    """A killed sweep leaves nothing running."""
    parent = parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def load_results(path: Path) -> dict[tuple[str, int], dict]:
    """Results of finished runs, by settings and seed; none where there is no file.

    Raises:
        UserError: the file is not what this tool writes.
    """
    try:
        results = json.loads(path.read_text())["runs"] if path.exists() else []
        return {(result["settings"], result["seed"]): result for result in results}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a results file of this tool ({error!r}); choose another by --results"
        ) from error


def record(path: Path, run: Run, result: dict) -> None:
    """Add a finished run to the results file."""
    results = load_results(path)
    results[run.settings, run.seed] = {"row": run.name, "settings": run.settings, **result}
    write_whole(path, json.dumps({"runs": list(results.values())}, indent=1) + "\n")


def _assignment(text: str, is_list: bool = False) -> tuple[str, object]:
    """The type of an argument NAME=VALUE, or NAME=VALUE,VALUE; values are YAML."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, yaml.safe_load(f"[{value}]" if is_list else value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is not YAML") from error
