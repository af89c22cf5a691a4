"""The command line: python -m pwm_gym.benchmark run | report."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tomllib
from collections.abc import Sequence
from typing import Any

import rich

from pwm_gym.benchmark.reporting import report
from pwm_gym.benchmark.runner import run
from pwm_gym.benchmark.study import PRECISIONS
from pwm_gym.cluster import RayCluster

_EXAMPLES = """
examples:
  python -m pwm_gym.benchmark run --algorithms pwm tdmpc2 sac ppo --tasks cartpole-swingup pendulum-swingup \\
      --seeds 0 1 2 --frames 30000 tdmpc2=10000
  python -m pwm_gym.benchmark run --algorithms pwm pwm@h16 --tasks walker-walk --seeds 0 1 --set pwm@h16.horizon=16
  python -m pwm_gym.benchmark run          # goes on with everything that isn't done
  python -m pwm_gym.benchmark report       # runs/benchmark/default/report.html
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pwm_gym.benchmark",
        description="Algorithms side by side: runs that can be resumed, honest statistics, a report.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmark"), help="default: %(default)s")
    place.add_argument("--name", default="default", help="the benchmark's folder in it (default: %(default)s)")
    some = commands.add_parser("run", parents=[place], help="run what isn't done yet, then report")
    some.add_argument("--algorithms", nargs="+", default=[], metavar="NAME", help="pwm, tdmpc2, sac, ppo, shac")
    some.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="such as walker-walk, or any env id")
    some.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED")
    some.add_argument(
        "--frames", nargs="+", default=["100000"], metavar="N", help="budget: one for all, or NAME=N (default: 100000)"
    )
    some.add_argument("--every", type=int, default=5_000, help="frames between evaluations (default: %(default)s)")
    some.add_argument("--episodes", type=int, default=10, help="of an evaluation (default: %(default)s)")
    some.add_argument("--set", action="append", default=[], metavar="NAME.ARG=JSON", help="change an argument")
    some.add_argument("--config", type=pathlib.Path, metavar="TOML", help="arguments, a table for each algorithm")
    some.add_argument("--world-model", metavar="FILE", help="train in this frozen model instead of in the task")
    some.add_argument("--data", metavar="DIR", help="dataset that its imagined episodes start from")
    some.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of float32 products (default: %(default)s)"
    )
    some.add_argument("--jobs", type=int, default=1, help="processes at the same time (default: %(default)s)")
    some.add_argument("--threads", type=int, default=1, help="of each (default: %(default)s)")
    some.add_argument("--device", default="cpu", help="default: %(default)s")
    RayCluster.add_arguments(some)
    commands.add_parser("report", parents=[place], help="write the report of what there is")
    return parser


def _budgets(given: Sequence[str], algorithms: Sequence[str]) -> dict[str, int]:
    """Read ["30000", "tdmpc2=10000"]."""
    common = [int(value) for value in given if "=" not in value]
    own = {name: int(value) for name, _, value in (pair.partition("=") for pair in given if "=" in pair)}
    if len(common) > 1 or not own.keys() <= {*algorithms}:
        raise ValueError(f"expected one number and NAME=N for algorithms that are run, got {' '.join(given)!r}.")
    return {**{name: value for name in algorithms for value in common}, **own}


def _arguments(config: pathlib.Path | None, pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read a TOML file, and pairs such as "pwm.horizon=16" on top of it."""
    arguments: dict[str, dict[str, Any]] = tomllib.loads(config.read_text(encoding="utf-8")) if config else {}
    for pair in pairs:
        place, equals, value = pair.partition("=")
        algorithm, dot, name = place.partition(".")
        if not (equals and dot):
            raise ValueError(f"expected NAME.ARG=JSON such as pwm.horizon=16, got {pair!r}.")
        try:
            read = json.loads(value)
        except json.JSONDecodeError:
            read = value  # a bare word is a string
        arguments.setdefault(algorithm, {})[name] = read
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        given: What stands behind the program's name; None for `sys.argv`.

    Returns:
        0, or 1 where a run died or what was asked for can't be done.
    """
    parsed = _parser().parse_args(given)
    folder = parsed.out / parsed.name
    died = False
    try:
        if parsed.command == "run":
            outcomes = run(
                folder,
                parsed.algorithms,
                parsed.tasks,
                parsed.seeds,
                frames=_budgets(parsed.frames, parsed.algorithms),
                every=parsed.every,
                episodes=parsed.episodes,
                arguments=_arguments(parsed.config, parsed.set),
                world_model=parsed.world_model,
                data=parsed.data,
                precision=parsed.precision,
                jobs=parsed.jobs,
                threads=parsed.threads,
                device=parsed.device,
                ray=RayCluster.of_arguments(parsed),
            )
            died = any(outcome.failure for outcome in outcomes)
            if died:
                rich.print("[red]Some runs died; the same command runs them again from where they were.[/red]")
        rich.get_console().print(f"report: {report(folder)}", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        rich.print("Stopped; the same command goes on.")
        return 1
    except (ImportError, OSError, ValueError) as error:
        rich.get_console().print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    return int(died)


if __name__ == "__main__":
    sys.exit(main())
