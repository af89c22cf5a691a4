"""Our update of a policy beside that of PWM's released code: same weights, data, noise and settings.

    git clone https://github.com/imgeorgiev/PWM
    python benchmarks/pwm_parity.py PWM

The reference runs on the CPU, without an env (as it trains on offline data), with stand-ins for the packages that it
imports and that an update doesn't need. Its agent is saved as its code saves it and read with `load_pwm_agent`. Each
row of results/extraction/parity.csv is a setting, each number the largest difference over the largest magnitude. Critic
minibatches are taken in the order of time there and shuffled here, so that whole updates are compared with one
minibatch.
"""

import argparse
import contextlib
import functools
import importlib.abc
import importlib.util
import pathlib
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from tables import put_row
from torch import Tensor

from pwm_gym import PWM, LatentVectorEnv, load_pwm_agent
from pwm_gym.agents.first_order import Rollout, critic_targets, improve_actor, rollout
from pwm_gym.checkpoints.layers import latent_order

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = ("walker-stand", "walker-walk", "walker-run")  # of one width: the released code doesn't mask padded actions
OBSERVATION, ACTION, TASK = 24, 6, 1
SIZES: dict[str, dict[str, Any]] = {
    "5M": {"latent_dim": 512, "units": [512, 512], "encoder_units": [256]},
    "48M": {"latent_dim": 768, "units": [1792, 1792], "encoder_units": [1792] * 3},
}
# name -> (arguments of the released PWM, arguments of ours)
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "released": ({"detach": True}, {}),
    "gradient through the policy's input": ({"detach": False}, {"detach_input": False}),
    "critic_method one-step": ({"detach": True, "critic_method": "one-step"}, {}),
}
STAND_INS = ("wandb", "hydra", "omegaconf", "gym", "tensordict", "torchrl")  # imported there, not needed by an update


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules in which every name stands for anything."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Offer a module for each of the packages and what is inside them."""
        return importlib.util.spec_from_loader(name, self, is_package=True) if name.split(".")[0] in STAND_INS else None

    def create_module(self, spec: Any) -> Any:
        """Make the module."""
        module: Any = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: mock.MagicMock(name=name)
        return module

    def exec_module(self, module: Any) -> None:
        """Run nothing."""


def import_reference(root: pathlib.Path) -> Any:
    """Import the reference's modules, leaving out its packages' __init__, which import simulators.

    Returns:
        A function that makes its agent: (folder for its files, size, tasks or () for one task, arguments of its PWM).
    """
    sys.meta_path.insert(0, StandIns())
    hydra: Any = importlib.import_module("hydra.utils")
    hydra.instantiate = lambda make, **kwargs: make(**kwargs)
    for name in ("pwm", "pwm.models", "pwm.utils", "pwm.algorithms"):
        module = types.ModuleType(name)
        module.__path__ = [str(root / "src" / name.replace(".", "/"))]
        sys.modules[name] = module
    from pwm.algorithms import pwm as algorithm
    from pwm.models.actor import ActorStochasticMLP
    from pwm.models.critic import CriticMLP
    from pwm.models.mlp import SimNorm
    from pwm.models.world_model import WorldModel

    def make(folder: str, size: str, tasks: Sequence[str] = TASKS, **kwargs: Any) -> Any:
        sizes = dict(SIZES[size])
        latent_dim = sizes.pop("latent_dim")
        latent = {"last_layer": "normedlinear", "last_layer_kwargs": {"act": SimNorm(8)}}
        world_model = functools.partial(
            WorldModel,
            encoder=latent,
            dynamics=latent,
            reward={"last_layer": "linear", "last_layer_kwargs": {}},
            num_bins=101,
            vmin=-10.0,
            vmax=10.0,
            multitask=bool(tasks),
            tasks=tasks,
            task_dim=64 if tasks else 0,
            action_dims=[ACTION] * len(tasks),
            **sizes,
        )
        actor = functools.partial(
            ActorStochasticMLP,
            units=[400, 200, 100],
            activation_class=torch.nn.Mish,
            init_logstd=-1.0,
            min_logstd=-1.427,
        )
        critic = functools.partial(CriticMLP, units=[400, 200], activation_class=torch.nn.Mish)
        fixed: dict[str, Any] = {"horizon": 16, "max_epochs": 10, "actor_grad_norm": 1.0, "critic_grad_norm": 100.0}
        fixed |= {"actor_lr": 5e-4, "critic_lr": 5e-4, "model_lr": 3e-4, "ret_rms": True, "critic_iterations": 8}
        fixed |= {"critic_batches": 1, **kwargs}
        with contextlib.redirect_stdout(None):  # it prints its networks
            made = algorithm.PWM(
                None, actor, critic, world_model, logdir=folder, latent_dim=latent_dim, obs_dim=OBSERVATION,
                act_dim=ACTION, device="cpu", **fixed,
            )  # fmt: skip
        randomise(made)
        return made

    return make


@torch.no_grad()
def randomise(reference: Any) -> None:
    """Give every parameter a value that matters: untrained models predict no reward."""
    generator = torch.Generator().manual_seed(0)
    for module in (reference.wm, reference.actor, reference.critic):
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            ensemble_vector = module is reference.critic and parameter.ndim == 2
            if parameter.ndim >= 2 and not ensemble_vector:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif name == "logstd":
                parameter.add_(0.2 * noise)
            else:
                parameter.add_(0.3 * noise)


def pinned(noise: Tensor) -> Iterator[Tensor]:
    """Hand out the noise step by step."""
    yield from noise


def reference_parts(reference: Any, observations: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Compute actor loss and gradient, targets and critic loss as the reference does, without a step."""
    steps = pinned(noise)
    with mock.patch("torch.distributions.normal._standard_normal", lambda *_, **__: next(steps)):
        reference.actor_optimizer.zero_grad()
        loss = reference.compute_actor_loss(observations, torch.full((len(observations),), TASK))
    loss.backward()
    reference.compute_target_values()
    batch = {
        "obs": reference.obs_buf.flatten(0, 1).unsqueeze(1),
        "target_values": reference.target_values.flatten()[:, None],
    }
    first, *rest = (p.grad for p in reference.actor.mu_net.parameters())
    columns = latent_order(reference.latent_dim, 8)  # ours, which are in another order
    return {
        "actor_loss": loss.detach(),
        "actor_gradient": torch.cat([g.flatten() for g in (reference.actor.logstd.grad, first[:, columns], *rest)]),
        "critic_targets": reference.target_values.clone(),
        "critic_loss": reference.compute_critic_loss(batch).detach(),
    }


def our_rollout(agent: PWM, observations: Tensor, noise: Tensor) -> Rollout:
    """Roll the same policy out in the same model."""
    env = agent.latent_env
    assert isinstance(env, LatentVectorEnv)
    steps = pinned(noise)
    actor = agent.policy.actor.latent_actor
    z = env.reset(options={"observations": observations})[0]
    with mock.patch.object(actor, "sample_noise", lambda *_: next(steps)):
        return rollout(env, z, actor, agent.horizon, None, agent.detach_input)


def our_parts(agent: PWM, observations: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Compute the same with our functions."""
    agent.world_model.requires_grad_(False)
    window = our_rollout(agent, observations, noise)
    actor, value = agent.policy.actor.latent_actor, agent.policy.critic.value
    target = agent.policy.critic_target.value
    still = torch.optim.SGD(actor.parameters(), lr=0.0)
    discount = agent.gamma if agent.extra_bootstrap_discount else 1.0
    metrics = improve_actor(
        window, actor, target, still, agent.policy.return_scale.update, lambda _: torch.zeros(()), agent.gamma,
        float("inf"), discount,
    )  # fmt: skip
    targets = critic_targets(window, target, agent.gamma, agent.td_lambda)
    gradient = [actor.log_std.grad, *(p.grad for p in [*actor.features.parameters(), *actor.mean.parameters()])]
    with torch.no_grad():
        critic_loss = (value(window.observations) - targets).square().mean()
    return {
        "actor_loss": metrics["actor_loss"],
        "actor_gradient": torch.cat([g.flatten() for g in gradient if g is not None]),
        "critic_targets": targets,
        "critic_loss": critic_loss,
    }


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def compare(make: Any, size: str, mode: str, batch: int, updates: int) -> dict[str, Any]:
    """Compare one setting: the parts of one update, then the losses and actions after several whole ones."""
    theirs_kwargs, ours_kwargs = MODES[mode]
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(updates + 1, batch, OBSERVATION, generator=generator)
    noise = torch.randn(updates + 1, 16, batch, ACTION, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        reference = make(folder, size, **theirs_kwargs)
        reference.save("agent")
        settings = {**PWM.RELEASED, "critic_minibatches": 1, **ours_kwargs}
        agent = load_pwm_agent(f"{folder}/agent.pt", tasks=TASKS, task=TASK, **settings)
    assert agent.latent_env is not None
    env = LatentVectorEnv(agent.world_model, torch.zeros(1, OBSERVATION), num_envs=batch, horizon=16)
    agent.set_env(env)
    theirs, ours = (f(x, observations[0], noise[0]) for f, x in ((reference_parts, reference), (our_parts, agent)))
    row: dict[str, Any] = {"model": size, "setting": mode, "batch": batch}
    row |= {name: difference(ours[name], theirs[name]) for name in theirs}
    for update in range(1, updates + 1):
        steps = pinned(noise[update])
        with mock.patch("torch.distributions.normal._standard_normal", lambda *_, s=steps, **__: next(s)):
            reported = reference.update(observations[update : update + 1], None, None, torch.full((batch,), TASK))
        steps, starts = pinned(noise[update]), {"observations": observations[update]}
        actor = agent.policy.actor.latent_actor
        with (
            mock.patch.object(actor, "sample_noise", lambda *_, s=steps: next(s)),
            mock.patch.object(agent, "_begin_rollout", lambda e, o=starts: e.reset(options=o)[0]),
        ):
            agent.train(1, batch)
    row["updates"] = updates
    for name, key in (("actor_loss", "actor_loss"), ("critic_loss", "value_loss")):
        row[f"{name}_after"] = difference(agent._metrics[name], torch.tensor(reported[key]))
    with torch.no_grad():
        acts = torch.as_tensor(agent.predict(observations[0].numpy(), deterministic=True)[0])
        z = reference.wm.encode(observations[0], torch.full((batch,), TASK))
        row["actions_after"] = difference(acts, torch.tanh(reference.actor(z, deterministic=True)))
    return row


def main() -> None:
    """Compare all settings and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=pathlib.Path, help="a checkout of github.com/imgeorgiev/PWM")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="default: %(default)s")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="default: all")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--updates", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "extraction" / "parity.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    make = import_reference(arguments.reference)
    for size in arguments.sizes:
        for mode in arguments.modes:
            row = compare(make, size, mode, arguments.batch, arguments.updates)
            print(row, flush=True)
            written = {name: f"{v:.1e}" if isinstance(v, float) else v for name, v in row.items()}
            put_row(arguments.out, written, ("model", "setting"))


if __name__ == "__main__":
    main()
