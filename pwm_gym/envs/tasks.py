"""Which env class plays each task; the tasks themselves stand in `pwm_gym.task_sets`."""

import difflib

from pwm_gym.task_sets import CUSTOM_TASKS, DM_CONTROL_TASKS, META_WORLD_TASKS, TASK_DIMS, TaskDims, tasks

__all__ = [
    "CUSTOM_TASKS",
    "DM_CONTROL_TASKS",
    "ENTRY_POINTS",
    "META_WORLD_TASKS",
    "TASK_DIMS",
    "TaskDims",
    "require_task",
    "tasks",
]

# Task -> the env class that plays it. Each class takes the task's name as its first argument.
ENTRY_POINTS = {
    **dict.fromkeys(DM_CONTROL_TASKS + CUSTOM_TASKS, "pwm_gym.envs.dm_control:DMControlEnv"),
    **dict.fromkeys(META_WORLD_TASKS, "pwm_gym.envs.meta_world:MetaWorldEnv"),
}


def require_task(task: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, with the nearest names, for a task that isn't among the choices."""
    if task not in choices:
        near = difflib.get_close_matches(str(task), choices, cutoff=0.4)
        raise ValueError(f"`task` is unknown: got {task!r}. Choose from {', '.join(near or choices)}.")
