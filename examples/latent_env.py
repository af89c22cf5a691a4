"""The learned model as an env of its own: a hand-written loop that back-propagates through `step`.

Random actions on cartpole-balance give 2,000 steps of experience, a small world model is fitted to them, and a policy of
a few hundred weights is improved with plain PyTorch: its imagined return is differentiated through the model, without a
critic and without a replay of rewards. Then it acts in the real env. About half a minute on one core.

    python examples/latent_env.py [--seed 1]
"""

import argparse
import time

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

import pwm_gym
from pwm_gym import LatentVectorEnv, SequenceReplayBuffer, WorldModel, WorldModelConfig

TASK = "pwm_gym/cartpole-balance-v0"


def collect(env: gym.Env, steps: int, seed: int) -> SequenceReplayBuffer:
    """Act at random and keep what happens."""
    replay = SequenceReplayBuffer(steps, env.observation_space, env.action_space, device="cpu")
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        action = env.action_space.sample()
        following, reward, terminated, truncated, info = env.step(action)
        info["TimeLimit.truncated"] = truncated and not terminated
        done = terminated or truncated
        replay.add(observation, following, action, np.array([reward]), np.array([done]), [info])
        observation = env.reset()[0] if done else following
    return replay


def imagined_return(env: LatentVectorEnv, policy: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Let the policy act in the model until the horizon.

    Returns:
        The undiscounted return of each env, (B,), and the actions of each step, (B, A).
    """
    z, _ = env.reset()
    total, actions = torch.zeros(env.num_envs), []
    for _ in range(env.horizon):
        actions.append(policy(z))
        z, reward, terminated, truncated, info = env.step(actions[-1])
        total = total + reward
    return total, actions


def action_gradients(env: LatentVectorEnv, policy: nn.Module) -> list[float]:
    """Measure how strongly the mean return depends on the actions of each step."""
    total, actions = imagined_return(env, policy)
    return [float(g.norm()) for g in torch.autograd.grad(total.sum(), actions)]


def improve(env: LatentVectorEnv, policy: nn.Module, updates: int) -> None:
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for update in range(updates):
        total, _ = imagined_return(env, policy)
        optimizer.zero_grad()
        (-total.mean()).backward()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if update % 25 == 0 or update == updates - 1:
            print(f"  update {update:3d}   imagined return {float(total.detach().mean()):6.2f}   |gradient| {float(norm):.3f}")


def real_return(env: gym.Env, world_model: WorldModel, policy: nn.Module, episodes: int = 3) -> float:
    """Run the policy in the real env, which it sees through the encoder."""
    total = 0.0
    for seed in range(episodes):
        observation, _ = env.reset(seed=1000 + seed)
        done = False
        while not done:
            with torch.no_grad():
                action = policy(world_model.encode(world_model.preprocess(observation[None])))[0].numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
    return total / episodes


def main() -> None:
    import sys
    hor=int(sys.argv[1]); upd=int(sys.argv[2]); mu=int(sys.argv[3]); task=sys.argv[4]; seed=int(sys.argv[5]); steps=int(sys.argv[6])
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    t0=time.process_time()
    env = gym.make(task)
    replay = collect(env, steps=steps, seed=seed)
    print("random per-step reward", replay.rewards.mean(), "x500", replay.rewards.mean()*500, time.process_time()-t0)
    config = WorldModelConfig(observation_dim=env.observation_space.shape[0], action_dim=env.action_space.shape[0], latent_dim=64, encoder_dim=64, mlp_dim=128)
    world_model = WorldModel(config, env.observation_space, env.action_space)
    losses = pwm_gym.fit_world_model(world_model, replay, updates=mu, horizon=5, seed=seed)
    print(losses, time.process_time()-t0)
    world_model.requires_grad_(False)
    latent_env = LatentVectorEnv(world_model, replay, num_envs=64, horizon=hor)
    latent_env.reset(seed=seed)
    policy = nn.Sequential(nn.Linear(64, 32), nn.ELU(), nn.Linear(32, config.action_dim), nn.Tanh())
    print(real_return(env, world_model, policy))
    print(["%.2f"%g for g in action_gradients(latent_env, policy)])
    improve(latent_env, policy, upd)
    print(["%.2f"%g for g in action_gradients(latent_env, policy)])
    print("real", real_return(env, world_model, policy), time.process_time()-t0)


if __name__ == "__main__":
    main()
