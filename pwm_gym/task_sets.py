"""The published sets of tasks: plain names and sizes, in the order by which data and checkpoints number them."""

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

DM_CONTROL_TASKS = tuple(_SUITE_DIMS)  # the suite's own part of MT30
CUSTOM_TASKS = tuple(_CUSTOM_DIMS)  # TD-MPC2's tasks on the suite's models
META_WORLD_TASKS = tuple(f"mw-{name}" for name in _META_WORLD_NAMES)

# Task -> its sizes, in the order of MT80.
TASK_DIMS: dict[str, TaskDims] = _SUITE_DIMS | _CUSTOM_DIMS | dict.fromkeys(META_WORLD_TASKS, TaskDims(39, 4))

_TASK_SETS = {
    "MT30": DM_CONTROL_TASKS + CUSTOM_TASKS,
    "MT50": META_WORLD_TASKS,
    "MT80": tuple(TASK_DIMS),
}


def tasks(name: str) -> tuple[str, ...]:
    """List the tasks of a published set; each is registered as `pwm_gym/<task>-v0`.

    The order is TD-MPC2's, by which its datasets and checkpoints number the tasks of MT30 and MT80.

    Args:
        name: "MT30" (dm_control), "MT50" (Meta-World) or "MT80" (both, dm_control first).

    Returns:
        The names of the tasks.

    Raises:
        ValueError: If there is no such set.

    Example:
        >>> len(tasks("MT30")), tasks("MT80")[30]
        (30, 'mw-assembly')
    """
    if name not in _TASK_SETS:
        near = difflib.get_close_matches(str(name).upper(), _TASK_SETS, cutoff=0.5)
        raise ValueError(f"`name` must be a set of tasks, got {name!r}. Choose from {', '.join(near or _TASK_SETS)}.")
    return _TASK_SETS[name]
