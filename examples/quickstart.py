"""A Stable-Baselines3 script with two lines changed: PWM in place of SAC, on dm_control's cartpole-swingup.

    python examples/quickstart.py --seed 0

trains until an evaluation reaches a return of 850, for at most 15,000 decisions (30,000 frames), keeps the policy that
its evaluations liked best, scores that once on 10 other episodes, and leaves the agent, its learning curve and a video
in runs/.
"""

import argparse
import pathlib

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.monitor import Monitor

from pwm_gym import PWM  # was: from stable_baselines3 import SAC
from pwm_gym.evaluation import episode_returns, plot_learning_curves, record_video


def main() -> None:
    """Train, choose, score, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="pwm_gym/cartpole-swingup-v0", help="a registered env (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15_000, help="decisions at the most (default: %(default)s)")
    parser.add_argument(
        "--enough", type=float, default=850.0, help="mean return of an evaluation that ends it (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for results (default: runs/...)")
    arguments = parser.parse_args()
    name = arguments.env.split("/")[-1]
    out = arguments.out or pathlib.Path("runs") / f"quickstart-{name}-seed{arguments.seed}"

    env = gym.make(arguments.env)
    eval_env = Monitor(gym.make(arguments.env))
    eval_env.reset(seed=1_000 + arguments.seed)
    choose_best = EvalCallback(
        eval_env,
        callback_on_new_best=StopTrainingOnRewardThreshold(arguments.enough),
        n_eval_episodes=5,
        eval_freq=1_000,
        best_model_save_path=str(out),
        log_path=str(out),
        verbose=0,
    )

    torch.set_float32_matmul_precision("medium")  # only for speed: bf16 products, where the processor has AMX
    agent = PWM("MlpPolicy", env, seed=arguments.seed)  # was: SAC("MlpPolicy", env, seed=arguments.seed)
    agent.learn(arguments.steps, callback=choose_best, progress_bar=True)
    agent.save(out / "last_model")

    best = PWM.load(out / "best_model")
    returns = episode_returns(best, gym.make(arguments.env), episodes=10, seed=2_000 + arguments.seed)
    evaluations = np.load(out / "evaluations.npz")
    curve = {f"PWM, seed {arguments.seed}": (evaluations["timesteps"], evaluations["results"])}
    plot_learning_curves(curve, out / "learning_curve.png", name, xlabel="decisions (2 frames each)")
    print(f"Best policy on 10 new episodes: {returns.mean():.0f} (from {returns.min():.0f} to {returns.max():.0f})")
    try:
        record_video(best, gym.make(arguments.env, render_mode="rgb_array"), out / "video.mp4", seed=3_000)
    except (ImportError, RuntimeError) as error:  # no OpenGL that draws without a display: docs/install.md
        print(f"No video: {error}")
    for path in sorted(out.iterdir()):
        print(f"  {path}")


if __name__ == "__main__":
    main()
