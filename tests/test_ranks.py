"""Pre-training in several processes: the same losses as in one, resuming in another number, and what they refuse."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from pwm_gym import OfflineDataset, WorldModel, cli, pretrain
from pwm_gym.datasets import Episode
from pwm_gym.networks import PartDropout
from pwm_gym.training import Ranks, pretraining

ROOT = pathlib.Path(__file__).parents[1]
TINY: dict[str, Any] = {
    "batch_size": 16,
    "horizon": 3,
    "checkpoint_every": 5,
    "log_every": 1,
    "device": "cpu",
    "world_model_kwargs": {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 21, "dropout": 0.1},
}

# What each process runs: `steps` names what it does in turn, so that several tests pay for one start.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from pwm_gym import OfflineDataset
from pwm_gym.training import Ranks, pretrain, pretraining

torch.set_num_threads(1)
folder, tiny, steps = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
said, losses = {}, []
mean = pretraining._Run.mean

def recorded(run, metrics):
    whole = mean(run, metrics)
    losses.append({name: float(value) for name, value in whole.items()})
    return whole

def refusal(action):
    try:
        return action()
    except (ConnectionError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

pretraining._Run.mean = recorded
with Ranks.join("cpu", sharded="sharded" in steps, timeout=60) as ranks:
    dataset = OfflineDataset.load(folder / "data")
    if "train" in steps:
        pretrain(dataset, "1M", updates=100, ranks=ranks, **tiny)
        said["train"] = list(losses)
    if "begin" in steps:
        pretrain(dataset, "1M", updates=10, out=folder / "run", ranks=ranks, **tiny)
    if "long" in steps:
        pretrain(dataset, "1M", updates=40, out=folder / "run", ranks=ranks, **tiny)
    if "refuse" in steps:
        said["part"] = [ranks.part(6).start, ranks.part(6).stop]
        other = "absent" if ranks.rank else "data"
        said["data"] = refusal(lambda: ranks.together("open the dataset", lambda: OfflineDataset.load(folder / other)))
        settings = {**tiny, "batch_size": 16 + 16 * ranks.rank}
        said["settings"] = refusal(lambda: pretrain(dataset, "1M", updates=1, ranks=ranks, **settings))
        said["odd"] = refusal(lambda: pretrain(dataset, "1M", updates=1, ranks=ranks, **{**tiny, "batch_size": 15}))
(folder / f"said-{ranks.rank}.json").write_text(json.dumps(said))
"""


def make_dataset() -> OfflineDataset:
    """Two tasks of different widths, of which one terminates now and then."""
    rng = np.random.default_rng(0)

    def episode(number: int) -> Episode:
        task, width = number % 2, 3 - number % 2
        observations, actions = rng.normal(size=(21, width)), rng.uniform(-1, 1, (20, width - 1))
        return Episode(observations, actions, observations[1:, 0], terminated=number % 8 == 7, task=task)

    return OfflineDataset([episode(i) for i in range(20)], ["glide", "turn"])


def start(
    folder: pathlib.Path, *steps: str, count: int = 2, path: tuple[pathlib.Path, ...] = (ROOT, ROOT)
) -> list[Any]:
    """Start processes as torchrun does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), json.dumps(TINY), *steps]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(path[rank])},
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for rank in range(2)
    ]


def finish(processes: list[Any], timeout: float = 300.0) -> list[str]:
    """Wait for processes and give what they complained of; none may be left running."""
    try:
        return [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(folder: pathlib.Path, rank: int) -> Any:
    return json.loads((folder / f"said-{rank}.json").read_text())


def assert_close(a: WorldModel, b: WorldModel, tolerance: float) -> None:
    theirs = b.state_dict()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def trained_alone(dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> list[dict[str, float]]:
    """Train in this process, and give the losses of every update."""
    losses, mean = [], pretraining._Run.mean

    def recorded(run: Any, metrics: Any) -> Any:
        losses.append({name: float(value) for name, value in mean(run, metrics).items()})
        return metrics

    with monkeypatch.context() as patched:
        patched.setattr(pretraining._Run, "mean", recorded)
        pretrain(dataset, "1M", **{**TINY, **arguments})
    return losses


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What two processes did and said."""
    folder = tmp_path_factory.mktemp("pair")
    torch.set_num_threads(1)
    make_dataset().save(folder / "data")
    processes = start(folder, "train", "begin", "refuse")
    complaints = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], complaints
    return folder


# The result


def test_two_processes_have_the_losses_of_one_over_a_hundred_updates(pair, monkeypatch):
    alone = trained_alone(OfflineDataset.load(pair / "data"), monkeypatch, updates=100)
    assert said(pair, 0)["train"] == said(pair, 1)["train"]
    for ours, theirs in zip(alone, said(pair, 0)["train"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    assert "termination_loss" in alone[-1] and "prior_loss" in alone[-1]


def test_what_two_processes_began_one_goes_on_with(pair, monkeypatch):
    folder, dataset = pair / "run", OfflineDataset.load(pair / "data")
    assert json.loads((folder / "summary.json").read_text())["processes"] == 2
    going_on = trained_alone(dataset, monkeypatch, updates=20, out=folder)
    assert json.loads((folder / "summary.json").read_text())["updates"] == 20
    alone = trained_alone(dataset, monkeypatch, updates=20, out=pair / "alone")
    assert len(going_on) == 10
    for ours, theirs in zip(alone[10:], going_on, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    assert_close(WorldModel.load(folder / "world_model.pt"), WorldModel.load(pair / "alone/world_model.pt"), 1e-4)


def test_only_the_first_process_writes(pair):
    names = {path.name for path in (pair / "run").iterdir()}
    assert names == {"checkpoint.pt", "world_model.pt", "summary.json", "validation.csv", "validation.png"}


def test_parts_of_dropout_make_up_the_whole_mask():
    x = torch.ones(2, 3 * 8, 5)  # (E, T B, F)
    whole = PartDropout(0.3)
    torch.manual_seed(0)
    expected = whole(x).unflatten(1, (3, 8))
    for rank in range(2):
        part = PartDropout(0.3)
        part.part, part.count = slice(4 * rank, 4 * rank + 4), 8
        torch.manual_seed(0)
        assert torch.equal(part(x[:, :12]).unflatten(1, (3, 4)), expected[:, :, part.part])
        assert part.draw((2, 4, 5)).is_contiguous()  # of a single time, too: kernels read it as it lies


def test_part_of_a_batch_is_that_part_of_the_whole_batch():
    dataset = make_dataset()
    whole, part = (dataset.sample_windows(8, 3, np.random.default_rng(0), None, s) for s in (None, slice(2, 5)))
    for name in ("observations", "actions", "rewards", "terminated"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, 2:5])
    assert torch.equal(part.task, whole.task[2:5])


# What is refused


def test_parts_of_a_batch_are_disjoint(pair):
    assert [said(pair, rank)["part"] for rank in range(2)] == [[0, 3], [3, 6]]


@pytest.mark.parametrize(
    "what, message",
    [
        ("data", "ValueError: expected to open the dataset in all 2 processes, but in 1 on .*: expected a dataset"),
        (
            "settings",
            "ValueError: expected the same arguments and data in all 2 processes, got .* batch_size 16 and 32",
        ),
        ("odd", "ValueError: expected a batch that 2 processes share evenly, got 15"),
    ],
)
def test_every_process_says_what_is_wrong_in_one(pair, what, message):
    for rank in range(2):
        assert re.match(message, said(pair, rank)[what])


def test_a_process_that_never_comes_is_missed_in_bounded_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    assert Ranks.launched()
    began = time.monotonic()
    with (
        pytest.raises(ConnectionError, match="expected 2 processes to meet at 127.0.0.1.* within 1 s"),
        Ranks.join(timeout=1),
    ):
        pass
    assert time.monotonic() - began < 30


def test_joining_without_torchrun_says_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not Ranks.launched()
    with pytest.raises(ValueError, match="expected to be started by torchrun, got no RANK"), Ranks.join():
        pass


def test_sharing_of_weights_and_training_alone_under_torchrun_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "data", "--out", "run", "--sharded"])
    assert "start them by torchrun" in capsys.readouterr().err
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="expected `ranks` in a script that torchrun started"):
        pretrain(make_dataset(), "1M", updates=1, **TINY)


@pytest.mark.expensive
def test_process_of_another_version_is_named(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "pwm_gym", other / "pwm_gym")
    with (other / "pwm_gym/functional.py").open("a") as file:
        file.write("# changed\n")
    complaints = finish(start(tmp_path, path=(ROOT, other)))
    for complaint in complaints:
        assert "ValueError: expected the same versions in all 2 processes" in complaint
        assert "in 1 on" in complaint and "source" in complaint


@pytest.mark.expensive
@pytest.mark.parametrize("sharded", [False, True])
def test_a_killed_process_ends_the_run_which_goes_on_in_one_or_two(tmp_path, monkeypatch, sharded):
    make_dataset().save(tmp_path / "data")
    how = ("sharded",) if sharded else ()
    processes = start(tmp_path, "long", *how)
    while not (tmp_path / "run/checkpoint.pt").exists():
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    finish(processes)
    assert processes[0].returncode != 0 and time.monotonic() - began < 60
    shutil.copytree(tmp_path / "run", tmp_path / "two/run")
    shutil.copytree(tmp_path / "data", tmp_path / "two/data")
    again = start(tmp_path / "two", "long", *how)
    complaints = finish(again)
    assert [process.returncode for process in again] == [0, 0], complaints
    dataset = OfflineDataset.load(tmp_path / "data")
    trained_alone(dataset, monkeypatch, updates=40, out=tmp_path / "run")
    trained_alone(dataset, monkeypatch, updates=40, out=tmp_path / "whole")
    whole = WorldModel.load(tmp_path / "whole/world_model.pt")
    for folder in (tmp_path / "run", tmp_path / "two/run"):
        assert_close(WorldModel.load(folder / "world_model.pt"), whole, 1e-3)
