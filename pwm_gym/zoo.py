"""rl_zoo3 with this package's agents: python -m pwm_gym.zoo train --algo pwm --env pwm_gym/cheetah-run-v0.

rl_zoo3 has no hook for other algorithms, so `install` adds ours to its table, and to that of its hyper-parameter
search. Everything else is rl_zoo3's own: options, logging, evaluation, tuning, folders.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from pwm_gym import agents
from pwm_gym.envs.factory import make_differentiable
from pwm_gym.sb3 import as_sb3_vec_env

__all__ = ["install", "main"]

_CLASSES = {"pwm": "PWM", "tdmpc2": "TDMPC2", "shac": "SHAC"}
_COMMANDS = ("train", "enjoy")


def _missing(error: ImportError) -> ImportError:
    return ImportError(f'the zoo needs rl_zoo3: pip install "pwm-gym[zoo]" ({error})')


def install() -> tuple[str, ...]:
    """Add this package's agents to rl_zoo3; calling it again changes nothing.

    Returns:
        The names that `--algo` now takes besides rl_zoo3's own.

    Raises:
        ImportError: If rl_zoo3 is missing.

    Example:
        >>> "pwm" in install()
        True
        >>> from rl_zoo3 import ALGOS
        >>> ALGOS["pwm"].__name__
        'PWM'
    """
    try:
        import rl_zoo3.train
        from rl_zoo3 import ALGOS, exp_manager
    except ImportError as error:
        raise _missing(error) from error
    found = {name: getattr(agents, cls) for name, cls in _CLASSES.items()}
    ALGOS.update(found)
    exp_manager.HYPERPARAMS_SAMPLER.update({name: _SAMPLERS[name] for name in found})
    converters: dict[str, Any] = exp_manager.HYPERPARAMS_CONVERTER
    converters.update(dict.fromkeys(found, _converted))
    launcher: Any = rl_zoo3.train
    launcher.ExperimentManager = _differentiable_manager()
    return tuple(found)


@functools.cache
def _differentiable_manager() -> type:
    """Make an ExperimentManager that trains SHAC in differentiable envs."""
    from rl_zoo3.exp_manager import ExperimentManager

    class DifferentiableManager(ExperimentManager):
        def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> Any:
            if self.algo != "shac" or eval_env:
                return super().create_envs(n_envs, eval_env, no_log)
            return as_sb3_vec_env(make_differentiable(self.env_name.gym_id, n_envs, **self.env_kwargs))

    return DifferentiableManager


# Search spaces. Names and values are those that the study stores; `_converted` makes arguments of them.


def _sample_pwm(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    trial.suggest_float("one_minus_gamma", 0.003, 0.03, log=True)
    trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True)
    trial.suggest_float("tau", 0.01, 0.2, log=True)
    trial.suggest_float("ent_coef", 1e-3, 0.1, log=True)
    trial.suggest_int("batch_size_pow", 5, 9)
    trial.suggest_int("horizon", 3, 16)
    trial.suggest_int("model_horizon", 3, 8)
    trial.suggest_int("train_freq", 1, 4)
    return _converted(trial.params)


def _sample_tdmpc2(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True)
    trial.suggest_float("tau", 0.005, 0.05, log=True)
    trial.suggest_float("ent_coef", 1e-5, 1e-3, log=True)
    trial.suggest_float("rho", 0.4, 0.9)
    trial.suggest_int("batch_size_pow", 6, 9)
    trial.suggest_int("horizon", 2, 5)
    return _converted(trial.params)


def _sample_shac(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    trial.suggest_float("one_minus_gamma", 0.003, 0.03, log=True)
    trial.suggest_float("learning_rate", 3e-4, 5e-3, log=True)
    trial.suggest_float("tau", 0.05, 1.0, log=True)
    trial.suggest_float("td_lambda", 0.8, 0.99)
    trial.suggest_float("ent_coef", 1e-4, 0.05, log=True)
    trial.suggest_int("horizon", 8, 32)
    return _converted(trial.params)


_SAMPLERS: dict[str, Callable[..., dict[str, Any]]] = {
    "pwm": _sample_pwm,
    "tdmpc2": _sample_tdmpc2,
    "shac": _sample_shac,
}


def _converted(sampled: dict[str, Any]) -> dict[str, Any]:
    """Turn what a study stores into arguments: {"one_minus_gamma": 0.01} into {"gamma": 0.99}, and so on."""
    arguments = dict(sampled)
    if "one_minus_gamma" in arguments:
        arguments["gamma"] = 1.0 - arguments.pop("one_minus_gamma")
    if "batch_size_pow" in arguments:
        arguments["batch_size"] = 2 ** arguments.pop("batch_size_pow")
    return arguments


# Command line


def _with_hyperparameters(arguments: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Point `train` to this package's hyper-parameter file where the algorithm is ours and no other file is given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo")
    parser.add_argument("-conf", "--conf-file")
    known, _ = parser.parse_known_args(arguments)
    if known.algo not in ours or known.conf_file is not None:
        return list(arguments)
    return [*arguments, "--conf-file", str(resources.files("pwm_gym") / "hyperparams" / f"{known.algo}.yml")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run rl_zoo3's `train` or `enjoy`, with its options, after adding this package's agents.

    Args:
        arguments: What stands behind the program's name; None for `sys.argv`.

    Raises:
        ImportError: If rl_zoo3 is missing.
    """
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    rest = rest[:-1]
    if command not in _COMMANDS:
        print(f"usage: python -m pwm_gym.zoo {{{','.join(_COMMANDS)}}} [rl_zoo3's options]", file=sys.stderr)  # noqa: T201
        sys.exit(0 if command in ("-h", "--help") else 2)
    ours = install()
    from rl_zoo3.enjoy import enjoy
    from rl_zoo3.train import train

    before = sys.argv
    sys.argv = [f"pwm_gym.zoo {command}", *(_with_hyperparameters(rest, ours) if command == "train" else rest)]
    try:
        {"train": train, "enjoy": enjoy}[command]()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
