"""The command line: `python -m pwm_gym COMMAND`."""

from __future__ import annotations

import argparse
import inspect
import pathlib
from collections.abc import Sequence
from contextlib import nullcontext

import rich
from stable_baselines3.common.utils import get_device

from pwm_gym.agents import PWM
from pwm_gym.cluster import RayCluster
from pwm_gym.collection import collect
from pwm_gym.datasets import OfflineDataset
from pwm_gym.extraction import SETTINGS, extract
from pwm_gym.replay import SequenceReplayBuffer
from pwm_gym.training import PAPER, Ranks, pretrain
from pwm_gym.world_model import WorldModel

__all__ = ["main"]

# Each command is a function that adds its arguments to a parser and sets `run`, which gets the parsed arguments.


def _add_collect(parser: argparse.ArgumentParser) -> None:
    """Gather a dataset from agents, noisy or random, in real envs."""
    parser.add_argument("env_ids", nargs="+", metavar="ENV", help="task, such as walker-walk, or any Gymnasium id")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--agent", action="append", help="a saved PWM; may be given several times; random without")
    parser.add_argument("--episodes", type=int, default=100, help="of each env (default: %(default)s)")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0], help="levels of action noise")
    parser.add_argument("--random-share", type=float, default=0.0, help="share of random episodes, in [0, 1]")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    RayCluster.add_arguments(parser)

    def run(args: argparse.Namespace) -> None:
        dataset = collect(
            args.env_ids,
            args.agent,
            args.episodes,
            args.out,
            noise=args.noise,
            random_share=args.random_share,
            num_workers=args.workers,
            seed=args.seed,
            ray=RayCluster.of_arguments(args),
        )
        rich.print(dataset.summary())

    parser.set_defaults(run=run)


def _add_import_tdmpc2(parser: argparse.ArgumentParser) -> None:
    """Turn shards in TD-MPC2's layout into a dataset."""
    parser.add_argument("paths", nargs="+", metavar="SHARD", help="shards in order, or the folder that they stand in")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--task-set", default="MT30", help="MT30 or MT80 (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="tasks to keep; all without")

    def run(args: argparse.Namespace) -> None:
        paths = args.paths[0] if len(args.paths) == 1 else args.paths
        rich.print(OfflineDataset.from_tdmpc2(paths, args.out, args.task_set, args.only).summary())

    parser.set_defaults(run=run)


def _add_import_minari(parser: argparse.ArgumentParser) -> None:
    """Turn a local Minari dataset into one of ours."""
    parser.add_argument("dataset_id")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--task", help="name of its task; the dataset's id without")

    def run(args: argparse.Namespace) -> None:
        dataset = OfflineDataset.from_minari(args.dataset_id, args.task)
        dataset.save(args.out)
        rich.print(dataset.summary())

    parser.set_defaults(run=run)


def _add_import_replay(parser: argparse.ArgumentParser) -> None:
    """Turn a saved replay buffer (save_replay_buffer) into a dataset."""
    parser.add_argument("path")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--task", default="task", help="name of its task")

    def run(args: argparse.Namespace) -> None:
        dataset = OfflineDataset.from_replay_buffer(SequenceReplayBuffer.load(args.path, "cpu"), args.task)
        dataset.save(args.out)
        rich.print(dataset.summary())

    parser.set_defaults(run=run)


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    """Train a world model on a dataset, under torchrun in several processes; a run that was killed goes on."""
    parser.add_argument("path", metavar="DATASET", help="folder of the dataset")
    parser.add_argument("--out", required=True, help="folder of the run: checkpoint, model, validation")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to train on; all without")
    parser.add_argument("--paper", action="store_true", help="published settings instead of those for small data")
    names = ["updates", "batch_size", "horizon", "rho", "learning_rate", "policy_learning_rate"]
    names += ["size", "learning_rate_schedule", "warmup", "precision", "held_out", "checkpoint_every"]
    names += ["validate_every", "seed", "device"]
    for name in names:
        default = inspect.signature(pretrain).parameters[name].default
        kind = int if name == "validate_every" else type(default)
        what = {"size": "1M, 5M, 19M, 48M or 317M ", "device": "cpu, cuda or auto "}.get(name, "")
        paper = f"; {PAPER[name]:g} with --paper" if name in PAPER else ""
        # Left out of what is parsed unless it is given, so that --paper can tell.
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,
            metavar=kind.__name__.upper(),
            help=f"{what}(default: {default}{paper})",
        )
    parser.add_argument("--no-planning", action="store_true", help="without value ensemble and policy prior")
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard")
    parser.add_argument("--sharded", action="store_true", help="under torchrun: share out the weights (FSDP)")

    def run(args: argparse.Namespace) -> None:
        given = {name: value for name, value in vars(args).items() if name in names}
        if args.sharded and not Ranks.launched():
            raise ValueError("expected several processes to share the weights, got one: start them by torchrun.")
        several = Ranks.join(given.pop("device", "auto"), args.sharded) if Ranks.launched() else nullcontext()
        with several as ranks:
            dataset = (ranks or Ranks()).together("open the dataset", lambda: OfflineDataset.load(args.path))
            pretrain(
                dataset.of_tasks(*args.tasks) if args.tasks else dataset,
                **{**(PAPER if args.paper else {}), **given},
                planning=not args.no_planning,
                out=args.out,
                tensorboard=args.tensorboard,
                progress_bar=True,
                ranks=ranks,
            )
            if ranks is not None and ranks.rank > 0:
                return
        rich.print((pathlib.Path(args.out) / "summary.json").read_text(encoding="utf-8"))

    parser.set_defaults(run=run)


def _add_extract(parser: argparse.ArgumentParser) -> None:
    """Make a policy for each task of a world model and score it; a run that was killed goes on when called again."""
    parser.add_argument("model", metavar="MODEL", help="file of the world model, such as world_model.pt of pretrain")
    parser.add_argument("path", metavar="DATASET", help="folder of the dataset")
    parser.add_argument("--out", required=True, help="folder of the run: agents, table, plot")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to make policies for; all without")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of several, each has a folder in OUT")
    names = ["updates", "num_envs", "real_steps", "episodes", "checkpoint_every"]
    for name in names:
        default = inspect.signature(extract).parameters[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--horizon", type=int, default=SETTINGS["horizon"], help="default: %(default)s")
    parser.add_argument(
        "--together", type=int, help="tasks in one batched program, 1 for one after another; all without"
    )
    parser.add_argument("--shared", action="store_true", help="one policy, conditioned on the task, instead of many")
    parser.add_argument("--finetune", action="store_true", help="go on fitting the model to the tasks' data")
    parser.add_argument("--released", action="store_true", help="settings of PWM's released code: PWM.RELEASED")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s); not on a cluster")
    RayCluster.add_arguments(parser)

    def run(args: argparse.Namespace) -> None:
        seed, cluster = args.seed[0] if len(args.seed) == 1 else args.seed, RayCluster.of_arguments(args)
        settings = {**(PWM.RELEASED if args.released else {}), "horizon": args.horizon}
        extract(
            WorldModel.load(args.model, "cpu" if cluster else get_device(args.device)),
            OfflineDataset.load(args.path),
            args.tasks,
            out=args.out,
            together=args.together,
            shared=args.shared,
            finetune=args.finetune,
            seed=seed,
            ray=cluster,
            progress_bar=True,
            reward_in_task_units=False if args.released else None,
            **{name: getattr(args, name) for name in names},
            **settings,
        )
        for table in sorted(pathlib.Path(args.out).glob("table.md" if isinstance(seed, int) else "seed-*/table.md")):
            rich.print(table.read_text(encoding="utf-8"))

    parser.set_defaults(run=run)


def _add_summary(parser: argparse.ArgumentParser) -> None:
    """Show a dataset's episodes, steps and returns by task."""
    parser.add_argument("path", help="folder of the dataset")
    parser.add_argument("--plot", metavar="PNG", help="also draw a histogram of returns by task")

    def run(args: argparse.Namespace) -> None:
        dataset = OfflineDataset.load(args.path)
        rich.print(dataset.summary())
        if args.plot:
            dataset.plot_returns(args.plot)

    parser.set_defaults(run=run)


_COMMANDS = {
    "collect": _add_collect,
    "extract": _add_extract,
    "import-tdmpc2": _add_import_tdmpc2,
    "import-minari": _add_import_minari,
    "import-replay": _add_import_replay,
    "pretrain": _add_pretrain,
    "summary": _add_summary,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: What stands behind the program's name; None for `sys.argv`.
    """
    parser = argparse.ArgumentParser(prog="python -m pwm_gym", description="Offline data for world models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add in _COMMANDS.items():
        text = (add.__doc__ or "").rstrip(".")
        add(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
