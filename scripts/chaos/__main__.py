"""Break training runs in every way that machines do, continue them, and compare their end with an undisturbed run's.

    python -m scripts.chaos --rounds 50 --seed 0

A round starts a run of seconds on generated images, inflicts one fault on it at a random moment, starts it again until
it is finished, and compares weights, optimiser, logged losses, TensorBoard curves and mIoU, bit for bit. It ends with a
table, and with status 1 if anything differed or a fault was not answered as it should be. A round whose run was already
finished when the fault struck counts as missed, not as equal. Linux only.
"""

from __future__ import annotations

import argparse
import collections
import logging
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.chaos.compare import difference, distance, end_state
from scripts.chaos.faults import FAULTS, Fault
from scripts.chaos.run import Missed, Run, Skipped, Unanswered, make_data, removed_at_the_end
from util.cli import run_main
from util.errors import ConfigError
from util.run_files import LATEST

METHODS = ("unimatch", "unimatch_v2")  # the second one has a teacher
# The distance of the ends, in float64, of one process and of two: their sums' last digits differ.
NEAR = 1e-7
FINE = ("skipped", "missed", "equal")  # verdicts


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(prog="scripts.chaos", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=len(FAULTS), metavar="N", help="faults to inflict, in turn")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no round after so long (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds of faults")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), metavar="F", help=f"of {', '.join(FAULTS)}")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, metavar="M", help=f"in turn, of {', '.join(METHODS)}"
    )
    args = parser.parse_args(argv)
    if unknown := [name for name in args.faults if name not in FAULTS]:
        raise ConfigError(f"--faults {unknown[0]}: there are {', '.join(FAULTS)}")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every continued run
    rng, table, started = random.Random(args.seed), Table(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        root = Path(scratch)
        make_data(root / "data")
        whole = Whole(root)
        for number in range(args.rounds):
            if args.minutes and time.monotonic() - started > 60 * args.minutes:
                break
            turn, place = divmod(number, len(args.faults))
            name = args.faults[place]
            fault = FAULTS[name]
            method = fault.method or args.methods[turn % len(args.methods)]
            expected, size = whole.end(method, fault.processes, not fault.exact)
            changes = settings(method, fault.processes)
            folder = root / f"round{number}"
            run = Run(folder, root / "data", fault.processes, method, changes, not fault.exact, checkpoint_bytes=size)
            with removed_at_the_end(run):
                verdict = play(run, fault, random.Random(rng.random()), expected)
            table.add(name, run.lost, verdict)
            print(
                f"round {number + 1}/{args.rounds}  {name}, {method}: {run.lost} steps repeated, {verdict}", flush=True
            )
    print(table)
    if table.wrong:
        sys.exit(1)


def settings(method: str, processes: int) -> list[str]:
    """What a run changes in the config: UniMatch V2 is trained by AdamW, and its BatchNorm needs two images."""
    if method != "unimatch_v2":
        return []
    return ["optimizer=adamw", *(["batch_size=2"] if processes == 1 else [])]


class Whole:
    """The ends of undisturbed runs, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root, self._ends = root, {}

    def end(self, method: str, processes: int, double: bool) -> tuple[dict[str, Any], int]:
        """What such a run leaves, and the bytes of its checkpoint."""
        key = method, processes, double
        if key not in self._ends:
            folder = self._root / f"{method}{processes}{'double' * double}"
            run = Run(folder, self._root / "data", processes, method, settings(method, processes), double)
            with removed_at_the_end(run):
                run.finish()
                self._ends[key] = end_state(run.path), (run.path / LATEST).stat().st_size
        return self._ends[key]


def play(run: Run, fault: Fault, rng: random.Random, expected: dict[str, Any]) -> str:
    """Harm a run, continue it, compare its end: `equal`, or what is wrong, or `skipped` and why.

    `missed`: the run was finished before the fault struck, so that its end shows nothing.
    """
    verdict = "equal"
    try:
        try:
            fault.inflict(run, rng)
        except Missed:
            verdict = "missed"
        run.finish()
        found = end_state(run.path)
    except Unanswered as error:
        return f"UNANSWERED: {error}"
    except Skipped as error:
        return f"skipped: {error}"
    if fault.exact:
        where = difference(expected, found)
    else:
        apart = distance(expected["model"], found["model"])
        where = None if apart < NEAR and expected["iteration"] == found["iteration"] else f"the weights by {apart:.1e}"
    return f"DIFFERS in {where}" if where else verdict


class Table:
    """Rounds by fault: how many, the steps that they lost, and how many got each verdict."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)

    def add(self, name: str, lost: int, verdict: str) -> None:
        self._rows[name].append((lost, verdict.partition(":")[0]))

    @property
    def wrong(self) -> bool:
        return any(verdict not in FINE for rounds in self._rows.values() for _, verdict in rounds)

    def __str__(self) -> str:
        lines = [f"\n{'fault':<18}{'rounds':>7}{'steps lost (most)':>20}{''.join(f'{verdict:>9}' for verdict in FINE)}"]
        for name, rounds in self._rows.items():
            lost = [steps for steps, _ in rounds]
            verdicts = [verdict for _, verdict in rounds]
            text = f"{sum(lost)} ({max(lost)})"
            counts = "".join(f"{verdicts.count(verdict):>9}" for verdict in FINE)
            lines.append(f"{name:<18}{len(rounds):>7}{text:>20}{counts}")
        return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
