"""Real environments: each task is one plain `gymnasium.Env`, registered as `pwm_gym/<task>-v0`."""

import gymnasium as gym

from pwm_gym.envs.tasks import DM_CONTROL_TASKS, ENTRY_POINTS, TORCH_PHYSICS_TASKS

__all__ = ["DM_CONTROL_TASKS", "register"]


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
    for task, entry_point in ENTRY_POINTS.items():
        if f"pwm_gym/{task}-v0" not in gym.registry:
            gym.register(f"pwm_gym/{task}-v0", entry_point=entry_point, kwargs={"task": task})
    for system in TORCH_PHYSICS_TASKS:
        if f"pwm_gym/{system}-v0" not in gym.registry:
            gym.register(f"pwm_gym/{system}-v0", vector_entry_point=f"pwm_gym.envs.torch_physics:{system}")
    if "pwm_gym/Latent-v0" not in gym.registry:
        gym.register("pwm_gym/Latent-v0", vector_entry_point="pwm_gym.latent_env:LatentVectorEnv")
