"""The tasks that `import pwm_gym` registers: plain names, so reading them imports no simulator."""

# The standard dm_control tasks of MT30, in the order of TD-MPC2 (arXiv:2310.16828).
DM_CONTROL_TASKS = (
    "walker-stand",
    "walker-walk",
    "walker-run",
    "cheetah-run",
    "reacher-easy",
    "reacher-hard",
    "acrobot-swingup",
    "pendulum-swingup",
    "cartpole-balance",
    "cartpole-balance-sparse",
    "cartpole-swingup",
    "cartpole-swingup-sparse",
    "cup-catch",
    "finger-spin",
    "finger-turn-easy",
    "finger-turn-hard",
    "fish-swim",
    "hopper-stand",
    "hopper-hop",
)

# Task -> the env class that plays it. Each class takes the task's name as its first argument.
ENTRY_POINTS = {
    **dict.fromkeys(DM_CONTROL_TASKS, "pwm_gym.envs.dm_control:DMControlEnv"),
}

# Systems of pwm_gym.envs.torch_physics, registered as vector envs.
TORCH_PHYSICS_TASKS = ("TorchPendulum", "TorchCartPole", "TorchDoublePendulum", "TorchBallWall")
