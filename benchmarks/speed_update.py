"""One policy update in a frozen model, against its own matrix products and against PWM's released code."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pwm_parity import ACTION, OBSERVATION, import_reference
from speed_products import record, replay
from speed_timing import clock, interleave, make_row, ratio
from torch import Tensor, nn

from pwm_gym import PWM, LatentVectorEnv, WorldModel, WorldModelConfig
from pwm_gym.agents.first_order import rollout, rollout_returns
from pwm_gym.training.fitting import _fast_matmul_is_exact

HORIZON = 16
CASES = {"5M, batch 64": ("5M", 64), "5M, batch 512": ("5M", 512), "48M, batch 64": ("48M", 64)}
FRACTION = 0.75  # of an update that its matrix products should take
FASTER = {"5M, batch 64": 3.5, "5M, batch 512": 3.2, "48M, batch 64": 3.5}  # than the released code, fp32
FASTER_BF16 = {"5M, batch 64": 4.5, "5M, batch 512": 5.0, "48M, batch 64": 5.5}


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# With AMX "medium" rounds the factors of products to bf16 and sums in fp32; all else stays fp32. Elsewhere it is exact.
# Ours are then no products of PyTorch's, and can't be recorded; PyTorch's go through oneDNN.
through_onednn = functools.partial(matmul_precision, "medium")
BF16 = "bf16 products"


def make_agent(size: str, batch: int, seed: int = 0) -> PWM:
    """Make a PWM with the released settings in a frozen model whose weights matter."""
    torch.manual_seed(seed)
    model = WorldModel(WorldModelConfig.preset(size, observation_dim=OBSERVATION, action_dim=ACTION)).eval()
    with torch.no_grad():  # untrained models predict no reward
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    env = LatentVectorEnv(model, torch.randn(1_000, OBSERVATION), num_envs=batch, horizon=HORIZON)
    settings: dict[str, Any] = {**PWM.RELEASED, "batch_size": batch, "seed": seed}
    settings["policy_kwargs"] = {k: v for k, v in settings["policy_kwargs"].items() if k == "net_arch"}
    return PWM("MlpPolicy", env, **settings)


def make_reference(root: pathlib.Path, size: str, batch: int) -> Callable[[], Any]:
    """Make the released code's update of the same sizes, with its own settings for them."""
    with tempfile.TemporaryDirectory() as folder:
        agent = _import_once(root)(folder, size, tasks=(), critic_batches=4, detach=True)
    observations = torch.randn(1, batch, OBSERVATION)
    return lambda: agent.update(observations, None, None, None)


@functools.cache
def _import_once(root: pathlib.Path) -> Any:
    return import_reference(root)


def under(context: Callable[[], Any], work: Callable[[], Any]) -> Callable[[], None]:
    """Do a piece of work in a context."""

    def run() -> None:
        with context():
            work()

    return run


def measure_update(case: str, threads: int, rounds: int, root: pathlib.Path | None) -> list[dict[str, Any]]:
    """Time an update of a case, its matrix products, and the released code's update, in turns."""
    size, batch = CASES[case]
    work: dict[str, Callable[[], Any]] = {}
    exact = _fast_matmul_is_exact()
    modes: dict[str, Callable[[], Any]] = {"": contextlib.nullcontext}
    if not exact:
        modes[f", {BF16}"] = through_onednn
    for suffix, context in modes.items():
        agent = make_agent(size, batch)
        update = under(context, functools.partial(agent.train, 1, batch))
        update()  # the first of all allocates what later ones keep
        lasting = [*agent.policy.parameters(), *agent.world_model.parameters()]
        work[f"update{suffix}"] = update
        if not suffix:
            products = replay(record(update, lasting).products)
            work["products"] = under(through_onednn, products) if exact else products
    if root is not None:
        work["reference"] = make_reference(root, size, batch)
        if exact:
            work["reference, oneDNN"] = under(through_onednn, work["reference"])
    seconds = interleave(work, rounds, clock(threads))

    def compare(numerator: str, denominator: str, goal: float | None = None) -> dict[str, Any]:
        value, below = ratio(seconds[numerator], seconds[denominator]), float(np.median(seconds[denominator]))
        return make_row("update", case, f"{numerator} / {denominator}", value, threads, rounds, goal, "higher", below)

    rows = [compare("products", "update", FRACTION)]
    if not exact:
        rows.append(compare("update", f"update, {BF16}"))
    if root is not None:
        rows.append(compare("reference", "update", FASTER[case]))
        rows.append(
            compare("reference, oneDNN", "update")
            if exact
            else compare("reference", f"update, {BF16}", FASTER_BF16[case])
        )
    return rows


def measure_defaults(task: str, rounds: int) -> list[dict[str, Any]]:
    """Time an update of online learning with PWM's defaults, world model included, in fp32 and with bf16 products."""
    if _fast_matmul_is_exact():
        return []
    agent = PWM("MlpPolicy", f"pwm_gym/{task}-v0", seed=0, device="cpu").learn(520)
    update = functools.partial(agent.train, 1, agent.batch_size)
    seconds = interleave({"update": update, BF16: under(through_onednn, update)}, rounds, clock(1), at_least=0.5)
    value, below = ratio(seconds["update"], seconds[BF16]), float(np.median(seconds[BF16]))
    return [make_row("update", f"defaults, {task}", f"update / update, {BF16}", value, 1, rounds, 2.0, "higher", below)]


# Accuracy


def gradients(agent: PWM, starts: Tensor, noise: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Compute the gradients of actor and critics of one update, flat."""
    env = agent.latent_env
    assert env is not None
    actor, critic = agent.policy.actor.latent_actor, agent.policy.critic.value
    env.world_model.requires_grad_(False)
    z = env.reset(options={"observations": starts})[0]
    steps = iter(noise)
    actor.sample_noise = lambda *_: next(steps)  # type: ignore[method-assign]
    window = rollout(env, z, actor, HORIZON)
    returns = rollout_returns(window, agent.policy.critic_target.value, agent.gamma)
    of_actor = torch.autograd.grad(returns.mean(), list(actor.features.parameters()))
    loss = (critic(window.observations) - targets).square().mean()
    of_critic = torch.autograd.grad(loss, list(critic.parameters()))
    parts = {"actor": of_actor, "critic": of_critic}
    return {name: torch.cat([gradient.flatten().double() for gradient in part]) for name, part in parts.items()}


def measure_accuracy(case: str) -> list[dict[str, Any]]:
    """Compare gradients with those of float64, in each of the ways to compute them."""
    size, batch = CASES[case]
    generator = torch.Generator().manual_seed(2)
    starts = torch.randn(batch, OBSERVATION, generator=generator)
    noise = torch.randn(HORIZON, batch, ACTION, generator=generator)
    targets = torch.randn(HORIZON, batch, generator=generator)
    agent = make_agent(size, batch)
    found = {}
    modes: dict[str, Callable[[], Any]] = {"fp32": contextlib.nullcontext}
    if not _fast_matmul_is_exact():
        modes[BF16] = through_onednn
    for name, context in modes.items():
        with context():
            found[name] = gradients(agent, starts, noise, targets)
    modules: list[nn.Module] = [agent.world_model, agent.policy]
    for module in modules:
        module.double()
    exact = gradients(agent, starts.double(), noise.double(), targets.double())
    rows = []
    for name, parts in found.items():
        for net, gradient in parts.items():
            error = float((gradient - exact[net]).norm() / exact[net].norm())
            cosine = float(torch.dot(gradient, exact[net]) / (gradient.norm() * exact[net].norm()))
            rows.append({"what": f"gradient of the {net}, {case}", "arithmetic": name, "relative_error": f"{error:.1e}",
                         "one_minus_cosine": f"{1.0 - cosine:.1e}"})  # fmt: skip
    return rows
