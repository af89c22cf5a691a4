"""Policies for many tasks of one world model, trained in one batched program."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from pwm_gym.agents.first_order import ActorCritic, rollout
from pwm_gym.agents.latent_actor import LatentActor
from pwm_gym.agents.policies import ReturnScale
from pwm_gym.agents.pwm import PWM
from pwm_gym.datasets import OfflineDataset
from pwm_gym.functional import frozen
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.networks import EnsembleLinear, EnsembleMLP, Stacked, block
from pwm_gym.replay import SequenceSamples
from pwm_gym.training import fast_matmul, make_model_optimizer, update_world_model
from pwm_gym.world_model import WorldModel

__all__ = ["PolicyBank"]


class _TaskActor(nn.Module):
    """The actors of K tasks as one `Policy` on rows of latents, the first B of which are of the first task, and so on.

    Args:
        net: From z (K, B, Z), noise (K, B, ...) and mask (K, 1, A) to actions (K, B, A) and entropy (K, B).
        agents: Whose actors and generators they are.
        masks: 1 for the task's own action dimensions, 0 for padding, (K, A).
    """

    def __init__(self, net: nn.Module, agents: Sequence[PWM], masks: Tensor) -> None:
        super().__init__()
        self.net, self.use_sde = net, agents[0].policy.actor.latent_actor.use_sde
        self._agents = (*agents,)
        self._masks = masks.unsqueeze(1)

    def sample_noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw each task's noise with its agent's generator, (K B, ..., A), with 0 in the padding."""
        rows = count // len(self._agents)
        drawn = [agent.policy.actor.latent_actor.sample_noise(rows, agent._generator) for agent in self._agents]
        width = self._masks.shape[-1]
        return torch.cat([nn.functional.pad(noise, (0, width - noise.shape[-1])) for noise in drawn])

    def forward(self, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Act on (K B, Z): actions (K B, A) and -log π (K B,)."""
        z, noise = (x.unflatten(0, (len(self._agents), -1)) for x in (z, noise))
        actions, entropy = self.net(z, noise, self._masks)
        return actions.flatten(0, 1), entropy.flatten()


class _Conditioned(nn.Module):
    """One network for all tasks, which reads a task's embedding beside z: (..., K, B, Z) and what else it takes."""

    def __init__(self, net: LatentActor | EnsembleMLP, embeddings: Tensor) -> None:
        super().__init__()
        self.net = net
        self._embeddings = embeddings  # (K, E)

    def forward(self, z: Tensor, *others: Tensor) -> Any:
        embeddings = self._embeddings.unsqueeze(1).expand(*z.shape[:-1], -1)
        return self.net(torch.cat([z, embeddings], -1), *others)

    @torch.no_grad()
    def write(self, members: Sequence[nn.Module]) -> None:
        """Give each task's module this network, with its embedding folded into the first layer's bias."""
        first, linear = next((n, m) for n, m in self.net.named_modules() if isinstance(m, nn.Linear | EnsembleLinear))
        weight = linear.weight if isinstance(linear, EnsembleLinear) else linear.weight.T  # (..., Z + E, out)
        for embedding, member in zip(self._embeddings, members, strict=True):
            latent = weight.shape[-2] - len(embedding)
            kept, folded = weight.split([latent, len(embedding)], -2)
            values = dict(self.net.named_parameters())
            values[f"{first}.weight"] = kept if isinstance(linear, EnsembleLinear) else kept.T
            values[f"{first}.bias"] = linear.bias + (embedding @ folded).reshape(linear.bias.shape)
            for name, parameter in member.named_parameters():
                parameter.copy_(block(values[name], parameter.shape))


class _Windows:
    """A dataset's windows with the padding and the task ids of a multi-task model."""

    def __init__(self, dataset: OfflineDataset, model: WorldModel) -> None:
        self._dataset, self._config = dataset, model.config
        self._ids = (
            torch.tensor([model.config.tasks.index(t) for t in dataset.tasks]) if model.config.num_tasks else None
        )

    def longest_window(self, limit: int) -> int:
        return self._dataset.longest_window(limit)

    def sample_windows(
        self,
        batch_size: int,
        horizon: int,
        rng: np.random.Generator | None = None,
        normalizer: VecNormalize | None = None,
        /,
        *,
        partial: bool = False,
    ) -> SequenceSamples:
        windows = self._dataset.sample_windows(batch_size, horizon, rng, normalizer, partial=partial)
        if self._ids is None:
            return windows
        widths = self._config.observation_dim, self._config.action_dim
        observations, actions = (
            nn.functional.pad(x, (0, width - x.shape[-1]))
            for x, width in zip((windows.observations, windows.actions), widths, strict=True)
        )
        own = torch.zeros(batch_size, dtype=torch.int64) if windows.task is None else windows.task.cpu()
        return windows._replace(observations=observations, actions=actions, task=self._ids[own])


class _Finetuning(NamedTuple):
    """What fits the world model while policies train."""

    optimizer: torch.optim.Optimizer
    windows: _Windows
    rng: np.random.Generator


class PolicyBank:
    """K agents, each with a task of its own in one world model, trained as one program.

    Each agent is an ordinary `PWM` on a `LatentVectorEnv(world_model, dataset, task=...)`. What it would do alone is
    done for all at once: one call of the multi-task model for the rollouts of all tasks, one batched product for a
    layer of all actors and critics, one optimizer. The settings are the agents' own and must be equal; random numbers
    come from each agent's generators, so that the results are those of training them one after another, but for
    rounding. It goes on from the agents' networks, with fresh optimizers.

    Args:
        agents: The agents. `write` puts what was learned into them.
        world_model: The model that their envs were made of.
        shared: Train one policy and critic for all tasks, conditioned on the task's embedding, instead of one for each.
            An agent then gets it with its own embedding folded in.
        finetune: Data of the tasks to go on fitting the world model to, before each update of the policies, with its
            own loss (two-hot cross-entropy where rewards are categorical, squared error where they are scalars). The
            model that was given stays as it is. None to leave the model frozen.

    Raises:
        ValueError: If the agents don't fit each other or the model.

    Example:
        >>> from pwm_gym import WorldModelConfig
        >>> dims = {"observation_dim": 3, "action_dim": 2, "action_dims": (1, 2)}
        >>> model = WorldModel(WorldModelConfig.preset("1M", **dims, tasks=("a", "b")))
        >>> starts, config = torch.rand(9, 3), model.config
        >>> envs = [LatentVectorEnv(model, starts, num_envs=4, horizon=2, task=task) for task in config.tasks]
        >>> bank = PolicyBank([PWM("MlpPolicy", env, horizon=2, seed=0) for env in envs], model)
        >>> bank.train(updates=1)["actor_loss"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        agents: Sequence[PWM],
        world_model: WorldModel,
        *,
        shared: bool = False,
        finetune: OfflineDataset | None = None,
    ) -> None:
        self.agents, self.updates, self.shared = (*agents,), 0, shared
        self._envs = [_latent_env(agent) for agent in agents]
        self.world_model = world_model if finetune is None else copy.deepcopy(world_model)
        config, lead = self.world_model.config, agents[0]
        names = [env.world_model.config.tasks for env in self._envs]
        if config.num_tasks and any(len(own) != 1 for own in names):
            raise ValueError("expected a world model that names its tasks (WorldModelConfig.tasks), got one without.")
        tasks = [own[0] for own in names] if config.num_tasks else None
        self._check()
        self._rows = self._envs[0].num_envs
        self.env = LatentVectorEnv(
            self.world_model,
            None,
            len(agents) * self._rows,
            lead.horizon,
            AutoresetMode.DISABLED,
            termination="none",
            task=tasks,
        )
        indices = None if self.env.task_rows is None else self.env.task_rows[:: self._rows]  # (K,)
        with torch.no_grad():
            masks = self.world_model.action_mask(indices).expand(len(agents), -1)  # (K, A)
            embeddings = masks[:, :0] if indices is None else self.world_model.embedding(indices)  # (K, E)
        self._make_nets(masks, embeddings)
        for agent, env in zip(agents, self._envs, strict=True):
            if agent.seed is not None and not env.has_started:
                env.np_random, _ = seeding.np_random(agent.seed)  # as the first reset of `learn` would
        self._finetuning = None
        if finetune is not None:
            rate = lead.policy.model_optimizer.param_groups[-1]["lr"]
            optimizer = make_model_optimizer(self.world_model, rate)
            rng = np.random.default_rng(lead.seed)
            self._finetuning = _Finetuning(optimizer, _Windows(finetune, self.world_model), rng)

    def _check(self) -> None:
        lead = self.agents[0]
        names = ["horizon", "gamma", "td_lambda", "tau", "ent_coef", "critic_epochs", "critic_minibatches"]
        names += ["max_grad_norm", "detach_input", "extra_bootstrap_discount", "use_sde"]
        for agent, env in zip(self.agents, self._envs, strict=True):
            for name in names:
                if getattr(agent, name) != getattr(lead, name):
                    raise ValueError(
                        f"expected agents of one `{name}`, got {getattr(lead, name)}, {getattr(agent, name)}."
                    )
            if env.num_envs != self._envs[0].num_envs:
                raise ValueError(f"expected as many envs for each task, got {self._envs[0].num_envs}, {env.num_envs}.")
        if lead.log_ent_coef is not None:
            raise ValueError("expected a fixed `ent_coef`, got 'auto': give a number.")

    def _make_nets(self, masks: Tensor, embeddings: Tensor) -> None:
        policies = [agent.policy for agent in self.agents]
        actors = [policy.actor.latent_actor for policy in policies]
        values = [policy.critic.value for policy in policies]
        actor: Any
        critic: Any
        if self.shared:
            wide = max(actors, key=lambda one: one.mean.out_features)
            latent, extra = self.world_model.config.latent_dim, embeddings.shape[-1]
            actor = _Conditioned(_widened(wide, latent, extra), embeddings)
            critic = _Conditioned(_widened(values[0], latent, extra), embeddings)
            target = copy.deepcopy(critic).requires_grad_(False)
        else:
            actor = Stacked(actors)
            critic = Stacked(values, -3, -2)
            target = Stacked([policy.critic_target.value for policy in policies], -3, -2)
        self._actor = _TaskActor(actor, self.agents, masks)
        self._scale = ReturnScale((len(self.agents),)).to(masks.device)
        for name in ("mean", "var", "count"):
            setattr(self._scale, name, torch.stack([getattr(policy.return_scale, name) for policy in policies]))
        self._nets = ActorCritic(
            actor,
            critic,
            target,
            _like(policies[0].actor_optimizer, actor),
            _like(policies[0].critic_optimizer, critic),
            self._scale.update,
            lambda _: self.agents[0].ent_coef_tensor,
            [agent._generator for agent in self.agents],
        )

    def train(self, updates: int, remaining: float = 1.0) -> dict[str, Tensor]:
        """Update world model (with `finetune`), actors and critics.

        Args:
            updates: How often.
            remaining: Share of the training that is left, in [0, 1], which schedules of the learning rate go by.

        Returns:
            The last update's metrics, (K,) each; () for those of the world model.

        Raises:
            ValueError: If a policy diverged.
        """
        lead, metrics = self.agents[0], dict[str, Tensor]()
        for optimizer in (self._nets.actor_optimizer, self._nets.critic_optimizer):
            update_learning_rate(optimizer, lead.lr_schedule(remaining))
        with fast_matmul(self.world_model.device):
            for _ in range(updates):
                metrics = self._fit_model(lead)
                with frozen(self.world_model):
                    window = rollout(self.env, self._begin(), self._actor, lead.horizon, detach_input=lead.detach_input)
                window = window.by_task(len(self.agents))
                metrics |= lead.update_policy(window, self._nets)
                self.updates += 1
        for name, value in metrics.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"expected finite numbers, got {name} = {value.tolist()} after {self.updates} updates: training "
                    f"diverged. Lower learning_rate, or check the data for numbers that are not finite."
                )
        return metrics

    def _fit_model(self, lead: PWM) -> dict[str, Tensor]:
        if self._finetuning is None:
            return {}
        optimizer, windows, rng = self._finetuning
        sizes = lead.model_batch_size, lead.model_horizon
        return update_world_model(self.world_model, optimizer, windows, *sizes, lead.rho, rng)

    @torch.no_grad()
    def _begin(self) -> Tensor:
        """Reset all rollouts to real states of their tasks' data, (K B, Z)."""
        width = self.world_model.config.observation_dim
        drawn = [env.sample_observations(self._rows, env.np_random) for env in self._envs]
        observations = torch.cat([nn.functional.pad(o, (0, width - o.shape[-1])) for o in drawn])  # (K B, O)
        return self.env.reset(options={"latents": self.world_model.encode(observations, self.env.task_rows)})[0]

    @torch.no_grad()
    def write(self) -> None:
        """Put networks, optimizers and statistics, and a world model that was fitted here, into the agents."""
        policies = [agent.policy for agent in self.agents]
        nets = self._nets
        optimizers = ((nets.actor, nets.actor_optimizer, "actor"), (nets.critic, nets.critic_optimizer, "critic"))
        for net, optimizer, name in optimizers:
            if isinstance(net, Stacked):
                net.write()
                _write_state(net, optimizer, [getattr(policy, f"{name}_optimizer") for policy in policies])
        if isinstance(nets.target, Stacked):
            nets.target.write()
        else:
            nets.actor.write([policy.actor.latent_actor for policy in policies])  # type: ignore[operator]
            nets.critic.write([policy.critic.value for policy in policies])  # type: ignore[operator]
            nets.target.write([policy.critic_target.value for policy in policies])  # type: ignore[operator]
        for k, (agent, env) in enumerate(zip(self.agents, self._envs, strict=True)):
            for name in ("mean", "var", "count"):
                getattr(agent.policy.return_scale, name).copy_(getattr(self._scale, name)[k])
            if self._finetuning is not None:
                task = env.world_model.config.tasks[0] if self.world_model.config.num_tasks else None
                env.world_model.load_state_dict(self.world_model.for_task(task).state_dict())
            agent.policy.actor.reset_average()
            agent._n_updates = self.updates
            agent.num_timesteps = self.updates * self._rows * agent.horizon

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs: tensors, numbers and text."""
        nets = self._nets
        modules = {"actor": nets.actor, "critic": nets.critic, "target": nets.target, "scale": self._scale}
        state: dict[str, Any] = {name: dict(module.state_dict()) for name, module in modules.items()}
        state |= {f"{n}_optimizer": getattr(nets, f"{n}_optimizer").state_dict() for n in ("actor", "critic")}
        state["updates"] = self.updates
        state["torch"] = [agent._generator.get_state() for agent in self.agents]
        state["numpy"] = [json.dumps(env.np_random.bit_generator.state) for env in self._envs]
        if self._finetuning is not None:
            state["model"] = dict(self.world_model.state_dict())
            state["model_optimizer"] = self._finetuning.optimizer.state_dict()
            state["model_numpy"] = json.dumps(self._finetuning.rng.bit_generator.state)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, for a bank made with the same arguments."""
        nets = self._nets
        modules = {"actor": nets.actor, "critic": nets.critic, "target": nets.target, "scale": self._scale}
        for name, module in modules.items():
            module.load_state_dict(state[name])
        for name in ("actor", "critic"):
            getattr(nets, f"{name}_optimizer").load_state_dict(state[f"{name}_optimizer"])
        self.updates = state["updates"]
        for agent, env, generator, text in zip(self.agents, self._envs, state["torch"], state["numpy"], strict=True):
            agent._generator.set_state(generator.cpu())
            env.np_random = np.random.default_rng()
            env.np_random.bit_generator.state = json.loads(text)
        if self._finetuning is not None:
            self.world_model.load_state_dict(state["model"])
            self._finetuning.optimizer.load_state_dict(state["model_optimizer"])
            self._finetuning.rng.bit_generator.state = json.loads(state["model_numpy"])


def _latent_env(agent: PWM) -> LatentVectorEnv:
    if agent.latent_env is None:
        raise ValueError("expected agents on LatentVectorEnvs, got one on a real env.")
    return agent.latent_env


def _like(optimizer: torch.optim.Optimizer, module: nn.Module) -> torch.optim.Optimizer:
    """Make an optimizer of the same class and settings for other parameters."""
    make: Any = type(optimizer)
    return make(module.parameters(), **optimizer.defaults)


def _write_state(stacked: Stacked, optimizer: torch.optim.Optimizer, members: Sequence[torch.optim.Optimizer]) -> None:
    """Give each member's optimizer its part of the stacked parameters' state."""
    for parameter, own in stacked.pairs():
        for k, (member, mine) in enumerate(zip(members, own, strict=True)):
            for name, value in optimizer.state.get(parameter, {}).items():
                mine_only = block(value[k], mine.shape) if value.shape == parameter.shape else value
                member.state[mine][name] = mine_only.clone()


@torch.no_grad()
def _widened(net: Any, latent_dim: int, extra: int) -> Any:
    """Copy a network and let its first layer read `extra` more numbers behind the latent, initialised as that is."""
    wide = copy.deepcopy(net)
    linear = next(m for m in wide.modules() if isinstance(m, nn.Linear | EnsembleLinear))
    ensemble = isinstance(linear, EnsembleLinear)
    weight = linear.weight if ensemble else linear.weight.T
    rows = torch.randint(latent_dim, (extra,), generator=torch.Generator().manual_seed(0)).to(weight.device)
    widened = torch.cat([weight, weight.index_select(-2, rows)], -2)  # of the scale of the other inputs' weights
    linear.weight = nn.Parameter((widened if ensemble else widened.T).contiguous())
    return wide
