"""Real environments: each task is one plain `gymnasium.Env`, registered as `pwm_gym/<task>-v0`."""

import gymnasium as gym

from pwm_gym.envs.multi_task import PaddedTask, multi_task_vector_env
from pwm_gym.task_sets import CUSTOM_TASKS, DM_CONTROL_TASKS, LOCOMOTION_TASKS, META_WORLD_TASKS, MUSCLE_TASKS

__all__ = ["PaddedTask", "multi_task_vector_env", "register"]

# Task -> the env class that plays it. Each class takes the task's name as its first argument.
_ENTRY_POINTS = {
    **dict.fromkeys(
        DM_CONTROL_TASKS + CUSTOM_TASKS + LOCOMOTION_TASKS + MUSCLE_TASKS, "pwm_gym.envs.dm_control:DMControlEnv"
    ),
    **dict.fromkeys(META_WORLD_TASKS, "pwm_gym.envs.meta_world:MetaWorldEnv"),
}

# Systems of pwm_gym.envs.torch_physics, registered as vector envs.
_TORCH_PHYSICS = ("TorchPendulum", "TorchCartPole", "TorchDoublePendulum", "TorchBallWall")


def register() -> None:
    """Register the package's environments with Gymnasium; `import pwm_gym` calls it.

    Entry points are strings, so no simulator is imported before `gymnasium.make` needs it. Ids that
    are registered already are left as they are, so calling it again changes nothing.

    The specs leave `max_episode_steps` unset: each env keeps its own time limit, which follows
    `action_repeat`.

    Example:
        >>> import gymnasium as gym
        >>> import pwm_gym
        >>> gym.spec("pwm_gym/walker-walk-v0").kwargs
        {'task': 'walker-walk'}
    """
    for task, entry_point in _ENTRY_POINTS.items():
        if f"pwm_gym/{task}-v0" not in gym.registry:
            gym.register(f"pwm_gym/{task}-v0", entry_point=entry_point, kwargs={"task": task})
    for system in _TORCH_PHYSICS:
        if f"pwm_gym/{system}-v0" not in gym.registry:
            gym.register(f"pwm_gym/{system}-v0", vector_entry_point=f"pwm_gym.envs.torch_physics:{system}")
    if "pwm_gym/Latent-v0" not in gym.registry:
        gym.register("pwm_gym/Latent-v0", vector_entry_point="pwm_gym.latent_env:LatentVectorEnv")
