"""The sets of tasks: plain names and sizes, so that reading them imports no simulator."""

import difflib
from typing import NamedTuple


class TaskDims(NamedTuple):
    """The sizes of a task's spaces.

    Attributes:
        observation: O, the length of an observation.
        action: A, the length of an action.
    """

    observation: int
    action: int


# Each part of MT80 in the order of TD-MPC2 (arXiv:2310.16828), whose datasets and checkpoints number tasks by it.

_SUITE_DIMS = {
    "walker-stand": TaskDims(24, 6),
    "walker-walk": TaskDims(24, 6),
    "walker-run": TaskDims(24, 6),
    "cheetah-run": TaskDims(17, 6),
    "reacher-easy": TaskDims(6, 2),
    "reacher-hard": TaskDims(6, 2),
    "acrobot-swingup": TaskDims(6, 1),
    "pendulum-swingup": TaskDims(3, 1),
    "cartpole-balance": TaskDims(5, 1),
    "cartpole-balance-sparse": TaskDims(5, 1),
    "cartpole-swingup": TaskDims(5, 1),
    "cartpole-swingup-sparse": TaskDims(5, 1),
    "cup-catch": TaskDims(8, 2),
    "finger-spin": TaskDims(9, 2),
    "finger-turn-easy": TaskDims(12, 2),
    "finger-turn-hard": TaskDims(12, 2),
    "fish-swim": TaskDims(24, 5),
    "hopper-stand": TaskDims(15, 4),
    "hopper-hop": TaskDims(15, 4),
}

_CUSTOM_DIMS = {
    "walker-walk-backwards": TaskDims(24, 6),
    "walker-run-backwards": TaskDims(24, 6),
    "cheetah-run-backwards": TaskDims(17, 6),
    "cheetah-run-front": TaskDims(17, 6),
    "cheetah-run-back": TaskDims(17, 6),
    "cheetah-jump": TaskDims(17, 6),
    "hopper-hop-backwards": TaskDims(15, 4),
    "reacher-three-easy": TaskDims(8, 3),
    "reacher-three-hard": TaskDims(8, 3),
    "cup-spin": TaskDims(8, 2),
    "pendulum-spin": TaskDims(3, 1),
}

_META_WORLD_NAMES = (
    *("assembly", "basketball", "button-press-topdown", "button-press-topdown-wall", "button-press"),
    *("button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn"),
    *("disassemble", "door-open", "door-close", "drawer-close", "drawer-open"),
    *("faucet-open", "faucet-close", "hammer", "handle-press-side", "handle-press"),
    *("handle-pull-side", "handle-pull", "lever-pull", "peg-insert-side", "peg-unplug-side"),
    *("pick-out-of-hole", "pick-place", "pick-place-wall", "plate-slide", "plate-slide-side"),
    *("plate-slide-back", "plate-slide-back-side", "push-back", "push", "push-wall"),
    *("reach", "reach-wall", "shelf-place", "soccer", "stick-push"),
    *("stick-pull", "sweep-into", "sweep", "window-open", "window-close"),
    *("bin-picking", "box-close", "door-lock", "door-unlock", "hand-insert"),
)

# TD-MPC2's high-dimensional locomotion: the suite's dog and humanoid.
_LOCOMOTION_DIMS = {
    "dog-stand": TaskDims(223, 38),
    "dog-walk": TaskDims(223, 38),
    "dog-trot": TaskDims(223, 38),
    "dog-run": TaskDims(223, 38),
    "humanoid-stand": TaskDims(67, 21),
    "humanoid-walk": TaskDims(67, 21),
    "humanoid-run": TaskDims(67, 21),
}

# Bodies of myo-sim, one action for each muscle.
_MUSCLE_DIMS = {
    f"{body}-{name}": dims
    for body, dims in {
        "myolegs": TaskDims(147, 80),
        "myotrunk": TaskDims(255, 152),
        "myofullbody": TaskDims(671, 416),
    }.items()
    for name in ("stand", "walk", "run")
}

DM_CONTROL_TASKS = tuple(_SUITE_DIMS)  # the suite's own part of MT30
CUSTOM_TASKS = tuple(_CUSTOM_DIMS)  # TD-MPC2's tasks on the suite's models
META_WORLD_TASKS = tuple(f"mw-{name}" for name in _META_WORLD_NAMES)
LOCOMOTION_TASKS = tuple(_LOCOMOTION_DIMS)
MUSCLE_TASKS = tuple(_MUSCLE_DIMS)

# Task -> its sizes: MT80 in its order, then the sets that are only ours.
TASK_DIMS: dict[str, TaskDims] = {
    **_SUITE_DIMS,
    **_CUSTOM_DIMS,
    **dict.fromkeys(META_WORLD_TASKS, TaskDims(39, 4)),
    **_LOCOMOTION_DIMS,
    **_MUSCLE_DIMS,
}

_TASK_SETS = {
    "MT30": DM_CONTROL_TASKS + CUSTOM_TASKS,
    "MT50": META_WORLD_TASKS,
    "MT80": DM_CONTROL_TASKS + CUSTOM_TASKS + META_WORLD_TASKS,
    "locomotion": LOCOMOTION_TASKS,
    "muscles": MUSCLE_TASKS,
}


def tasks(name: str) -> tuple[str, ...]:
    """List the tasks of a set; each is registered as `pwm_gym/<task>-v0`.

    The order is TD-MPC2's, by which its datasets and checkpoints number the tasks of MT30 and MT80.

    Args:
        name: "MT30" (dm_control), "MT50" (Meta-World), "MT80" (both, dm_control first), "locomotion" (dm_control's dog
            and humanoid) or "muscles" (myo-sim's bodies).

    Returns:
        The names of the tasks.

    Raises:
        ValueError: If there is no such set.

    Example:
        >>> import pwm_gym
        >>> len(pwm_gym.tasks("MT30")), pwm_gym.tasks("MT80")[30]
        (30, 'mw-assembly')
    """
    if name not in _TASK_SETS:
        known = {key.upper(): key for key in _TASK_SETS}
        near = [known[key] for key in difflib.get_close_matches(str(name).upper(), known, cutoff=0.5)]
        raise ValueError(f"`name` must be a set of tasks, got {name!r}. Choose from {', '.join(near or _TASK_SETS)}.")
    return _TASK_SETS[name]


def require_task(task: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, with the nearest names, for a task that isn't among the choices."""
    if task not in choices:
        near = difflib.get_close_matches(str(task), choices, cutoff=0.4)
        raise ValueError(f"`task` is unknown: got {task!r}. Choose from {', '.join(near or choices)}.")
