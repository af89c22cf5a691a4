"""What goes wrong when a policy learns in a model: measurements, and the signatures of known failures in them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rich
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from pwm_gym.functional import frozen
from pwm_gym.replay import WindowSource
from pwm_gym.serialization import atomic_write
from pwm_gym.world_model import WorldModel

if TYPE_CHECKING:
    from pwm_gym.agents.pwm import PWM

__all__ = ["DiagnoseCallback", "Diagnosis", "Finding", "diagnose"]

_NEWEST = 5_000  # steps of an agent's replay buffer that count as its present policy's
_NOISE_SAMPLES = 8  # rollouts from the same state, between which a gradient's noise is measured
_NEIGHBOURS = 1_024  # latents of real states that imagined ones are compared with
_CRITIC_STEPS = 50  # real steps before the critic's own estimate takes over in the target it is compared with

# Where a measurement becomes a finding.
_EXPLOITED = 2.0  # imagined above real reward, in standard deviations of the real one
_EXPLODING = 100.0  # growth of the gradient's norm along the horizon
_NOISY = 0.1  # signal-to-noise ratio of the gradient at the horizon
_OUTSIDE = 3.0  # distance of starts to real states, in usual distances between real states
_DRIFTED = 1.0  # critic's bias, in standard deviations of its targets
_PLATEAU_EPISODES, _PLATEAU_GAIN = 40, 0.05  # finished episodes to judge by; gain, as a share of their spread


class Finding(NamedTuple):
    """One failure that the measurements show.

    Attributes:
        signature: "exploited model", "exploding gradients", "noisy gradients", "starts outside the data",
            "critic drift" or "plateau".
        evidence: The figures it was seen by.
        remedy: What to try.
    """

    signature: str
    evidence: str
    remedy: str


class Diagnosis(NamedTuple):
    """Measurements of an agent and its model, and what they show. Printed, it is a report.

    Attributes:
        findings: The failures seen; empty for a healthy agent.
        scalars: Single figures by name.
        along_horizon: Figures for each of the H imagined steps by name, (H,): the model's open-loop
            "reward_correlation" and "latent_error" (as a share of the latents' variance), and "gradient_norm" and
            "gradient_snr" of the imagined return up to that step with respect to the first action.
    """

    findings: tuple[Finding, ...]
    scalars: dict[str, float]
    along_horizon: dict[str, np.ndarray]

    def __str__(self) -> str:
        lines = [f"{name:>28}: {value:.4g}" for name, value in self.scalars.items()]
        for name, values in self.along_horizon.items():
            lines.append(f"{name:>28}: " + " ".join(f"{value:.3g}" for value in values))
        for finding in self.findings:
            lines += ["", f"{finding.signature.upper()}: {finding.evidence}", f"  {finding.remedy}"]
        return "\n".join(lines if self.findings else [*lines, "", "No known failure is visible."])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the figures along the horizon, one panel each.

        Args:
            path: The picture, .png.

        Raises:
            ImportError: If matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('a plot needs matplotlib: pip install "pwm-gym[examples]"') from error
        figure = Figure(figsize=(3.4 * len(self.along_horizon), 3.0), dpi=120, layout="constrained")
        for axes, (name, values) in zip(
            figure.subplots(1, len(self.along_horizon)), self.along_horizon.items(), strict=True
        ):
            axes.plot(np.arange(1, len(values) + 1), values, marker="o", markersize=3)
            axes.set(title=name.replace("_", " "), xlabel="imagined steps")
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            axes.grid(alpha=0.3)
        with atomic_write(path) as file:
            figure.savefig(file, format=pathlib.Path(path).suffix.lstrip(".") or "png")


def diagnose(agent: PWM, data: WindowSource | None = None, batch_size: int = 256, seed: int = 0) -> Diagnosis:
    """Measure an agent against real experience, and name the failures that show. Nothing is changed or trained.

    Args:
        agent: The agent.
        data: Real experience of about its present policy, in its task's own spaces; None for the newest 5,000 steps of
            its own replay buffer.
        batch_size: Windows of real experience B.
        seed: Of the windows and of the policy's noise.

    Raises:
        ValueError: If there is no real experience to compare with.

    Example:
        >>> from pwm_gym import PWM
        >>> agent = PWM("MlpPolicy", "Pendulum-v1", learning_starts=190, seed=0).learn(total_timesteps=200)
        >>> sorted(diagnose(agent).along_horizon)
        ['gradient_norm', 'gradient_snr', 'latent_error', 'reward_correlation']
    """
    recent: dict[str, Any] = {}
    if data is None:
        if agent.latent_env is not None:
            raise ValueError(
                "expected `data`, got None: an agent in a frozen model has no experience of its own. Give the dataset "
                "or replay buffer that the model was fitted to."
            )
        data, recent = agent.sequence_replay(), {"newest": _NEWEST}
    length = data.longest_window(_CRITIC_STEPS)
    if length == 0:
        raise ValueError("expected real experience to compare with, got none. Collect some with learn(...).")
    rng, generator = np.random.default_rng(seed), torch.Generator(agent.device).manual_seed(seed)
    model, horizon = agent.world_model.eval(), min(agent.horizon, length)
    windows = data.sample_windows(batch_size, length, rng, agent.get_vec_normalize_env(), **recent)
    observations: Any = windows.observations
    flat = {k: v.flatten(0, 1) for k, v in observations.items()} if isinstance(observations, dict) else None
    with frozen(model), frozen(agent.policy.actor):
        with torch.no_grad():
            inputs = model.preprocess(observations.flatten(0, 1) if flat is None else flat)
            real = model.encode(inputs).unflatten(0, (length + 1, batch_size))  # (L + 1, B, Z)
            actions, rewards = windows.actions.to(real), windows.rewards.to(real)  # (L, B, A), (L, B)
            along = _model_errors(model, real, actions, rewards, horizon)
            scalars = _critic_bias(agent, real, rewards, windows.terminated.to(real))
        starts = real[0] if agent.latent_env is None else agent.latent_env.sample_starts(batch_size, rng)
        gradients, imagined = _gradients(agent, starts, horizon, generator)
    scalars |= imagined
    scalars |= {"real_reward": float(rewards.mean()), "real_reward_std": float(rewards.std())}
    _, distinct = np.unique(inputs.detach().cpu().numpy(), axis=0, return_index=True)  # windows overlap
    scalars["start_distance"] = _start_distance(starts, real.flatten(0, 1)[distinct], generator)
    along |= gradients
    episodes = [float(info["r"]) for info in agent.ep_info_buffer or []]
    return Diagnosis(tuple(_findings(scalars, along, episodes)), scalars, along)


def _model_errors(
    model: WorldModel, real: Tensor, actions: Tensor, rewards: Tensor, horizon: int
) -> dict[str, np.ndarray]:
    """Unroll the model with the actions that were taken and compare with what happened."""
    z, spread = real[0], real.var((0, 1)).mean() + 1e-12
    correlation, error = [], []
    for t in range(horizon):
        z, predicted = model(z, actions[t])
        pair = torch.stack([predicted, rewards[t]])  # (2, B)
        constant = bool((pair.std(1) < 1e-6).any())
        correlation.append(float("nan") if constant else float(torch.corrcoef(pair)[0, 1]))
        error.append(float((z - real[t + 1]).square().mean() / spread))
    return {"reward_correlation": np.array(correlation), "latent_error": np.array(error)}


def _critic_bias(agent: PWM, real: Tensor, rewards: Tensor, terminated: Tensor) -> dict[str, float]:
    """Compare values with what came of them: L real rewards, then the critic's own estimate."""
    target = agent.policy.critic.value(real[-1]).amin(0)  # (B,)
    for t in reversed(range(len(rewards))):
        target = rewards[t] + agent.gamma * (1.0 - terminated[t]) * target
    value = agent.policy.critic.value(real[0]).amin(0)
    bias = (value - target).mean() / (target.std() + 1e-6)
    return {"value": float(value.mean()), "value_target": float(target.mean()), "critic_bias": float(bias)}


def _gradients(
    agent: PWM, starts: Tensor, horizon: int, generator: torch.Generator
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Let the policy act in the model, several times from each state, and differentiate by the first action."""
    model, actor = agent.world_model, agent.policy.actor.latent_actor
    z = starts[: max(1, len(starts) // _NOISE_SAMPLES)].repeat_interleave(_NOISE_SAMPLES, 0)  # (B, Z)
    rewards, entropies, first = [], [], None
    for t in range(horizon):
        if t == 0 or not actor.use_sde:
            noise = actor.sample_noise(len(z), generator)
        action, entropy = actor(z, noise)  # (B, A), (B,)
        if first is None:
            first = action = action.detach().requires_grad_()
        z, reward = model(z, action)
        rewards.append(agent.gamma**t * reward)
        entropies.append(entropy)
    assert first is not None, "the horizon is at least 1"
    norms, ratios = [], []
    for h in range(1, horizon + 1):
        imagined_return = torch.stack(rewards[:h]).sum()
        (gradient,) = torch.autograd.grad(imagined_return, first, retain_graph=h < horizon)  # (B, A)
        samples = gradient.unflatten(0, (-1, _NOISE_SAMPLES))  # (states, samples, A)
        norms.append(float(gradient.norm(dim=-1).mean()))
        noise_power = samples.var(1).sum()
        signal_power = samples.mean(1).square().sum() - noise_power / _NOISE_SAMPLES  # without the mean's own noise
        ratios.append(max(0.0, float(signal_power / (noise_power + 1e-20))))
    undiscounted = torch.stack([reward / agent.gamma**t for t, reward in enumerate(rewards)]).detach()
    imagined = {"imagined_reward": float(undiscounted.mean()), "entropy": float(torch.stack(entropies).detach().mean())}
    return {"gradient_norm": np.array(norms), "gradient_snr": np.array(ratios)}, imagined


def _start_distance(starts: Tensor, real: Tensor, generator: torch.Generator) -> float:
    """Compare how far starts are from the nearest real state with how far real states are from each other; medians."""
    order = torch.randperm(len(real), generator=generator, device=real.device)[: 2 * _NEIGHBOURS]
    some, others = real[order].chunk(2)
    usual = torch.cdist(others, some).amin(1).median()
    return float(torch.cdist(starts, some).amin(1).median() / (usual + 1e-12))


def _findings(scalars: dict[str, float], along: dict[str, np.ndarray], episodes: list[float]) -> Iterator[Finding]:
    imagined, real, spread = scalars["imagined_reward"], scalars["real_reward"], scalars["real_reward_std"]
    if imagined - real > _EXPLOITED * spread + 1e-3 * abs(real) + 1e-6:
        yield Finding(
            "exploited model",
            f"imagined reward {imagined:.3g} a step against {real:.3g} in reality, where it varies by {spread:.3g}.",
            "The policy earns in the model what it doesn't get in reality. Shorten `horizon`, raise `ent_coef`, or "
            "give the model more real data of this policy.",
        )
    norm, ratio = along["gradient_norm"], along["gradient_snr"]
    if not np.isfinite(norm).all() or norm[-1] > _EXPLODING * max(norm[0], 1e-12):
        yield Finding(
            "exploding gradients",
            f"norm {norm[0]:.3g} over one imagined step, {norm[-1]:.3g} over {len(norm)}.",
            "Keep SimNorm on the latent (`regularizer`), or shorten `horizon`.",
        )
    if ratio[-1] < _NOISY:
        yield Finding(
            "noisy gradients",
            f"signal-to-noise ratio {ratio[0]:.3g} over one imagined step, {ratio[-1]:.3g} over {len(ratio)}.",
            "Noise of the policy's own actions outweighs the gradient. Shorten `horizon` or raise `batch_size`.",
        )
    if scalars["start_distance"] > _OUTSIDE:
        yield Finding(
            "starts outside the data",
            f"rollouts start {scalars['start_distance']:.3g} times as far from real states as those from each other.",
            "There the model was never fitted. Start from the data that it was fitted to (`start`).",
        )
    if abs(scalars["critic_bias"]) > _DRIFTED:
        yield Finding(
            "critic drift",
            f"value {scalars['value']:.3g} against {scalars['value_target']:.3g} from real rewards, "
            f"{abs(scalars['critic_bias']):.3g} of the targets' standard deviation apart.",
            "Lower `tau` or the learning rate, or lower `td_lambda` if it is the model's rewards that are wrong.",
        )
    if len(episodes) >= _PLATEAU_EPISODES:
        quarter = len(episodes) // 4
        before, now = np.mean(episodes[:quarter]), np.mean(episodes[-quarter:])
        if now - before < _PLATEAU_GAIN * (max(episodes) - min(episodes)):
            yield Finding(
                "plateau",
                f"mean return {before:.3g} in the first quarter of the last {len(episodes)} episodes, {now:.3g} in the "
                f"last.",
                "If more can be reached: raise `ent_coef` or `log_std_min` for more exploration, or train more often "
                "(`train_freq`).",
            )


class DiagnoseCallback(BaseCallback):
    """Diagnose the agent now and then while it learns: figures go to the logger, findings that are new are printed.

    Args:
        every: Steps between two diagnoses, over all envs.
        verbose: 1 to print findings.
    """

    def __init__(self, every: int = 10_000, verbose: int = 1) -> None:
        super().__init__(verbose)
        if every < 1:
            raise ValueError(f"`every` must be >= 1, got {every}.")
        self.every = every
        self.latest: Diagnosis | None = None
        self._next = every

    def _on_training_start(self) -> None:
        self._next = self.model.num_timesteps + self.every

    def _on_step(self) -> bool:
        agent: Any = self.model
        if agent.num_timesteps < self._next or agent.num_timesteps <= agent.learning_starts:
            return True
        self._next = agent.num_timesteps + self.every
        known = {finding.signature for finding in self.latest.findings} if self.latest else set()
        self.latest = diagnose(agent)
        for name, value in self.latest.scalars.items():
            self.logger.record(f"diagnosis/{name}", value)
        for name, values in self.latest.along_horizon.items():
            self.logger.record(f"diagnosis/{name}_at_horizon", float(values[-1]))
        for finding in self.latest.findings:
            if self.verbose and finding.signature not in known:
                rich.print(
                    f"[bold]{agent.num_timesteps} steps, {finding.signature}[/]: {finding.evidence} {finding.remedy}"
                )
        return True
