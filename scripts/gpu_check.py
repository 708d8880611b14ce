"""Prove on a GPU that everything works there and is fast: the tests marked gpu and the GPU part of the benchmark.

    sh scripts/gpu_check.sh --out exp/gpu_check          # or PYTHON=PATH sh scripts/gpu_check.sh

Writes report.md and report.json: the device, versions, each check, each time as a ratio to the naive way in the same
run, peak memory. Needs no network and installs nothing; both parts have a time limit, together less than 8 minutes.
The exit status is 0 if every check passed, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from util.cli import run_main
from util.config import PROJECT_ROOT
from util.errors import ConfigError
from util.outputs import MARK, check_targets, replacing

TESTS_LIMIT, BENCHMARK_LIMIT = 270, 180  # seconds
OUT_HELP = "folder of the report, from the project's root (default: exp/gpu_check)"
CHECK = re.compile(r"^(tests/\S+?\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
NOT_COLLECTED = re.compile(r"^ERROR (tests/\S+?\.py)(?: - .*)?$", re.MULTILINE)  # in pytest's summary


def main(argv: Sequence[str] | None = None) -> None:
    """Check the first GPU and write the report."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("exp/gpu_check"), metavar="DIR", help=OUT_HELP)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ConfigError(f"no GPU: torch {torch.__version__} sees none, and there is nothing to check without one")
    check_targets([args.out / name for name in ("report.md", "report.json", "benchmark.json")], [])
    report = {"tool": MARK, "device": describe_device(), "notes": [], "checks": {}, "rows": []}
    run_tests(report)
    write_report(report, args.out)
    run_benchmark(report, args.out / "benchmark.json")
    write_report(report, args.out)
    print(f"{summary(report)}; see {args.out.absolute() / 'report.md'}")
    if not all_passed(report):
        sys.exit(1)


def describe_device() -> dict[str, str]:
    """The GPU and the versions of what computes on it."""
    gpu = torch.cuda.get_device_properties(0)
    return {
        "GPU": f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, capability {gpu.major}.{gpu.minor}",
        "GPUs": str(torch.cuda.device_count()),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda or torch.version.hip),
        "cuDNN": str(torch.backends.cudnn.version()),
        "Python": f"{platform.python_version()} ({platform.machine()})",
    }


def run_tests(report: dict[str, Any]) -> None:
    """Run the tests marked gpu and add what became of each."""
    if importlib.util.find_spec("pytest") is None:
        report["notes"].append(f"The tests were not run: {sys.executable} has no pytest.")
        return
    options = ["-m", "gpu", "-v", "-p", "no:cacheprovider", "--color=no", "--continue-on-collection-errors"]
    # Status 1: tests failed, which the checks say one by one. Any other: pytest itself did not get to its end.
    output = run_part(
        [sys.executable, "-m", "pytest", *options, "tests"], TESTS_LIMIT, "tests", report, statuses=(0, 1)
    )
    report["checks"] = read_checks(output)
    if not report["checks"]:
        report["notes"].append("No test ran: " + " / ".join(output.strip().splitlines()[-3:]))


def run_benchmark(report: dict[str, Any], path: Path) -> None:
    """Run the benchmark's GPU part and add its rows, those measured within the time limit."""
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts.benchmark.gpu", "--json", str(path.absolute())]
    output = run_part(command, BENCHMARK_LIMIT, "benchmark", report)
    if path.exists():
        report["rows"] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    else:
        report["notes"].append("Nothing was measured: " + " / ".join(output.strip().splitlines()[-3:]))


def read_checks(output: str) -> dict[str, str]:
    """What `pytest -v` printed: passed, failed, error or skipped, by the name of the test or of the broken file."""
    checks = {name: result.lower() for name, result in CHECK.findall(output)}
    return checks | dict.fromkeys(NOT_COLLECTED.findall(output), "error")


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json and report.md into `folder`."""
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with replacing(folder / "report.md") as temporary:
        temporary.write_text(as_markdown(report), encoding="utf-8")


def as_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# GPU check", "", f"<!-- {MARK} -->", "", summary(report) + ".", ""]
    lines += [f"- {name}: {value}" for name, value in report["device"].items()]
    lines += ["", *(f"**{note}**" for note in report["notes"]), "", "## Against the naive way", ""]
    lines += ["| what | naive | here | ratio | |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        naive, ours = (_figure(row[way], row["unit"]) for way in ("naive", "ours"))
        lines.append(f"| {row['name']} | {naive} | {ours} | {row['ratio']:.2f} | {row['equality']} |")
    lines += ["", "## Checks", ""]
    lines += [f"- {result}: `{name}`" for name, result in report["checks"].items()]
    return "\n".join([*lines, ""])


def summary(report: dict[str, Any]) -> str:
    """One line: how many checks had which result, and how much was measured."""
    counts = {
        result: list(report["checks"].values()).count(result) for result in ("passed", "failed", "error", "skipped")
    }
    parts = [f"{count} {result}" for result, count in counts.items() if count]
    failed = sum(_is_broken(row) for row in report["rows"])
    parts.append(f"{len(report['rows']) - failed} measured" + (f", {failed} could not be" if failed else ""))
    return f"{'all checks passed' if all_passed(report) else 'NOT all checks passed'}: {', '.join(parts)}"


def all_passed(report: dict[str, Any]) -> bool:
    """Whether tests ran to their end, none failed, and every row could be measured."""
    results = set(report["checks"].values())
    return (
        "passed" in results
        and not results & {"failed", "error"}
        and not report["notes"]
        and bool(report["rows"])
        and not any(map(_is_broken, report["rows"]))
    )


def _is_broken(row: dict[str, Any]) -> bool:
    return row["equality"].startswith("FAILED")


def _figure(values: Sequence[float], unit: str) -> str:
    middle = sorted(values)[len(values) // 2]
    return "-" if math.isnan(middle) else f"{middle:.3g} {unit}"


def run_part(
    command: Sequence[str], limit: int, name: str, report: dict[str, Any], statuses: Sequence[int] = (0,)
) -> str:
    """Run a part and return what it printed. A note in the report says if it reached its limit or broke off.

    It broke off if its exit status is none of `statuses`.
    """
    print(f"{name}: at most {limit} s ...", flush=True)
    started, note = time.monotonic(), None
    try:
        done = subprocess.run(
            command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit, check=False
        )
        output, status = done.stdout.decode(errors="replace"), done.returncode
        if status not in statuses:
            end = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
            note = f"The {name} broke off with {end}: {' / '.join(output.strip().splitlines()[-3:])}"
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        note = f"The {name} were ended after {limit} s; what follows is what they had done by then."
    report["notes"] += [note] if note else []
    report["device"][f"seconds of the {name}"] = f"{time.monotonic() - started:.0f}"
    return output


if __name__ == "__main__":
    run_main(main)
