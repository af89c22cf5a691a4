"""`LatentVectorEnv.step` against bare calls of its model, and against other libraries' envs around the same model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pwm_parity import ACTION, OBSERVATION
from speed_timing import clock, interleave, make_row, ratio
from torch import Tensor

from pwm_gym import LatentVectorEnv, WorldModel, WorldModelConfig

STEPS = 16
OVERHEAD = 1.15  # of a step over the bare model's call, at most
AT_LEAST = 0.1  # seconds of a turn
NEVER = 1_000_000_000  # steps until an env's episode ends, where resets are left out


def make_model(latent_dim: int = 512) -> WorldModel:
    """Make a frozen model of TD-MPC2's 5M, with another latent where that is wanted."""
    torch.manual_seed(0)
    config = WorldModelConfig.preset("5M", observation_dim=OBSERVATION, action_dim=ACTION, latent_dim=latent_dim)
    return WorldModel(config).eval().requires_grad_(False)


def bare(model: WorldModel, z: Tensor, actions: Tensor) -> Callable[[], Tensor]:
    """Call the model alone, step after step, and sum the rewards up."""

    def run() -> Tensor:
        state, total = z, torch.zeros(())
        for _ in range(STEPS):
            state, reward = model(state, actions)
            total = total + reward.sum()
        return total

    return run


def stepping(env: LatentVectorEnv, actions: Tensor) -> Callable[[], Tensor]:
    """Step the env as often."""
    env.reset(seed=0)

    def run() -> Tensor:
        env.detach()
        total = torch.zeros(())
        for _ in range(STEPS):
            total = total + env.step(actions)[1].sum()
        return total

    return run


def forward_only(work: Callable[[], Any]) -> Callable[[], Any]:
    """Do it without gradients."""
    return torch.no_grad()(work)


def with_gradients(work: Callable[[], Tensor], actions: Tensor) -> Callable[[], Any]:
    """Do it, and compute the gradient with respect to the actions."""
    return lambda: torch.autograd.grad(work(), actions)


def measure_step(num_envs: int, rounds: int) -> list[dict[str, Any]]:
    """Compare steps with bare calls, forward only and with gradients."""
    model = make_model()
    starts = torch.randn(max(num_envs, 1_000), OBSERVATION)
    z = model.encode(starts[:num_envs])
    actions = torch.zeros(num_envs, ACTION, requires_grad=True)
    plain = {
        "bare": bare(model, z, actions),
        "step": stepping(LatentVectorEnv(model, starts, num_envs, NEVER), actions),
        "step and resets": stepping(LatentVectorEnv(model, starts, num_envs, STEPS), actions),
    }
    work = {f"{name}, forward": forward_only(piece) for name, piece in plain.items()}
    work |= {f"{name}, with gradients": with_gradients(piece, actions) for name, piece in plain.items()}
    seconds = interleave(work, rounds, clock(1), AT_LEAST)
    rows = []
    for kind in ("forward", "with gradients"):
        below = seconds[f"bare, {kind}"]
        for name, goal in (("step", OVERHEAD), ("step and resets", None)):
            value = ratio(seconds[f"{name}, {kind}"], below)
            measure, step = f"{name} / bare model, {kind}", float(np.median(below)) / STEPS
            rows.append(make_row("env", f"{num_envs} envs", measure, value, 1, rounds, goal, "lower", step))
    return rows


# Other libraries' envs


def mbrl_env(model: WorldModel, actions: Tensor, z: Tensor) -> Callable[[], Any]:
    """Step mbrl-lib's `ModelEnv` around the model."""
    from mbrl.models import Model, ModelEnv

    class Networks(Model):
        def forward(self, x: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        loss = eval_score = forward

        def save(self, save_dir: Any) -> None:
            raise NotImplementedError

        load = save

        def reset(self, obs: Any, rng: Any = None) -> dict[str, Tensor]:
            return {"z": torch.as_tensor(obs)}

        def sample(
            self, act: Tensor, model_state: dict[str, Tensor], deterministic: bool = False, rng: Any = None
        ) -> Any:
            following, reward = model(model_state["z"], act)
            return following, reward.unsqueeze(-1), None, {"z": following}

    never = torch.zeros(len(z), 1, dtype=torch.bool)
    spaces = LatentVectorEnv(model, num_envs=1)
    env = ModelEnv(spaces, Networks("cpu"), lambda *_: never)
    first = z.numpy()

    def run() -> None:
        state = env.reset(first, return_as_np=False)
        for _ in range(STEPS):
            _, _, _, state = env.step(actions, state)

    return run


def torchrl_env(model: WorldModel, actions: Tensor, z: Tensor) -> Callable[[], Any]:
    """Step an env made of TorchRL's `ModelBasedEnvBase` around the model."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.data import Composite, Unbounded
    from torchrl.envs import ModelBasedEnvBase

    def step(state: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
        following, reward = model(state, act)
        return following, reward.unsqueeze(-1)

    class Env(ModelBasedEnvBase):
        def __init__(self) -> None:
            networks = TensorDictModule(step, in_keys=["z", "action"], out_keys=["z", "reward"])
            super().__init__(networks, batch_size=torch.Size([len(z)]))
            self.observation_spec = Composite(z=Unbounded(z.shape), shape=self.batch_size)
            self.state_spec = Composite(z=Unbounded(z.shape), shape=self.batch_size)
            self.action_spec = Unbounded(actions.shape)
            self.reward_spec = Unbounded((len(z), 1))

        def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
            return TensorDict({"z": z}, batch_size=self.batch_size)

    env = Env()

    def run() -> None:
        state = env.reset()
        for _ in range(STEPS):
            state["action"] = actions
            _, state = env.step_and_maybe_reset(state)

    return run


PEERS = {"mbrl-lib": ("mbrl", mbrl_env), "TorchRL": ("torchrl", torchrl_env)}


def measure_peers(num_envs: int, rounds: int) -> list[dict[str, Any]]:
    """Compare with other libraries' envs, where they are installed: forward only, the very same networks in each."""
    model, actions = make_model(), torch.zeros(num_envs, ACTION)
    starts = torch.randn(num_envs, OBSERVATION)
    z = model.encode(starts)
    work: dict[str, Callable[[], Any]] = {"ours": stepping(LatentVectorEnv(model, starts, num_envs, NEVER), actions)}
    for name, (module, make) in PEERS.items():
        if importlib.util.find_spec(module) is not None:
            work[name] = make(model, actions, z)
    seconds = interleave({name: forward_only(piece) for name, piece in work.items()}, rounds, clock(1), AT_LEAST)
    below = seconds["ours"]
    step = float(np.median(below)) / STEPS
    return [
        make_row(
            "env", f"{num_envs} envs", f"{name} / LatentVectorEnv, forward", ratio(of, below), 1, rounds, seconds=step
        )
        for name, of in seconds.items()
        if name != "ours"
    ]


# Growth

GROWTH: dict[str, Sequence[int]] = {
    "num_envs": (1, 4, 16, 64, 256, 1_024, 4_096),
    "horizon": (1, 2, 4, 8, 16, 32, 64),
    "latent_dim": (64, 128, 256, 512, 1_024, 2_048),
}
FIXED = {"num_envs": 64, "horizon": 16, "latent_dim": 512}


def measure_growth(rounds: int) -> list[dict[str, Any]]:
    """Time rollouts from reset to truncation, forward and backward, as one of the sizes grows."""
    rows = []
    for name, values in GROWTH.items():
        for value in values:
            sizes = {**FIXED, name: value}
            model, num_envs = make_model(sizes["latent_dim"]), sizes["num_envs"]
            env = LatentVectorEnv(model, torch.randn(1_000, OBSERVATION), num_envs, sizes["horizon"])
            actions = torch.zeros(num_envs, ACTION, requires_grad=True)
            env.reset(seed=0)

            def rewards(env: LatentVectorEnv = env, actions: Tensor = actions) -> Tensor:
                env.detach()
                return torch.stack([env.step(actions)[1].sum() for _ in range(env.horizon)]).sum()

            work = {"forward": forward_only(rewards), "with gradients": with_gradients(rewards, actions)}
            seconds = interleave(work, rounds, clock(1), AT_LEAST / 5)
            rows.append(
                {"varied": name, **sizes, **{f"{k}_ms": f"{1e3 * np.median(s):.4g}" for k, s in seconds.items()}}
            )
    return rows
