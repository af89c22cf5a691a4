"""Files of agents: complete, atomic, and never executed unless the caller says so."""

from __future__ import annotations

import base64
import copy
import io
import json
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common import save_util
from stable_baselines3.common.noise import NormalActionNoise
from torch import nn

from pwm_gym import PWM, UnsafeFileError


class Malicious:
    """What would create a file when it is unpickled."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (pathlib.Path.touch, (self.path,))


def rewrite(path: pathlib.Path, changes: dict[str, bytes | None]) -> None:
    """Replace entries of an agent's file, or leave them out."""
    with zipfile.ZipFile(path) as archive:
        entries: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**entries, **changes}.items():
            if content is not None:
                archive.writestr(name, content)


def entries_of(path: pathlib.Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("data"))


@pytest.fixture
def saved(make_agent: Any, toy: Any, tmp_path: Any) -> tuple[PWM, pathlib.Path]:
    agent = make_agent(toy()).learn(25)
    agent.save(tmp_path / "agent")
    return agent, tmp_path / "agent.zip"


# Complete


def test_weights_optimizers_targets_and_statistics_are_restored(saved: Any, differences: Any):
    agent, path = saved
    loaded = PWM.load(path, device="cpu")
    assert differences(agent, loaded) == []
    for name in ("actor_optimizer", "critic_optimizer", "model_optimizer"):
        ours, theirs = getattr(agent.policy, name).state_dict(), getattr(loaded.policy, name).state_dict()
        assert len(ours["state"]) > 0
        assert all(torch.equal(ours["state"][i]["exp_avg"], theirs["state"][i]["exp_avg"]) for i in ours["state"])
    target = agent.policy.critic_target.state_dict()
    assert any(not torch.equal(v, agent.policy.critic.state_dict()[k]) for k, v in target.items())
    assert all(torch.equal(v, loaded.policy.critic_target.state_dict()[k]) for k, v in target.items())
    assert agent.policy.return_scale.count > 1
    assert torch.equal(agent.policy.return_scale.var, loaded.policy.return_scale.var)
    assert loaded._rng.bit_generator.state == agent._rng.bit_generator.state
    assert torch.equal(loaded._generator.get_state(), agent._generator.get_state())


def test_attributes_are_restored(saved: Any):
    agent, path = saved
    loaded = PWM.load(path, device="cpu")
    for name in ("horizon", "gamma", "tau", "num_timesteps", "_n_updates", "policy_kwargs", "train_freq", "seed"):
        assert getattr(loaded, name) == getattr(agent, name), name
    assert [info["l"] for info in loaded.ep_info_buffer] == [8, 8, 8]
    np.testing.assert_array_equal(loaded._last_obs, agent._last_obs)


def test_stochastic_predictions_go_on_after_a_file(saved: Any):
    agent, path = saved
    loaded = PWM.load(path, device="cpu")
    observation = agent.observation_space.sample()
    for _ in range(3):
        np.testing.assert_array_equal(agent.predict(observation)[0], loaded.predict(observation)[0])


def test_an_agent_can_be_saved_again_and_changed_while_loading(saved: Any, differences: Any, tmp_path: Any):
    agent, path = saved
    PWM.load(path, device="cpu").save(tmp_path / "again")
    again = PWM.load(tmp_path / "again", device="cpu", gamma=0.5, learning_rate=1e-2)
    assert (again.gamma, again.lr_schedule(1.0)) == (0.5, 1e-2)
    assert differences(agent, again) == []


def test_a_plain_agent_has_no_pickles_in_its_file(saved: Any):
    _, path = saved
    assert [name for name, entry in entries_of(path).items() if ":serialized:" in str(entry)] == []


@pytest.mark.parametrize("name", ["agent", "agent.zip", "agent.v2", pathlib.Path("folder") / "agent"])
def test_names_of_files_work_as_in_sb3(name: Any, saved: Any, tmp_path: Any):
    agent, _ = saved
    (tmp_path / "here").mkdir()
    target = tmp_path / "here" / name
    agent.save(str(target))
    assert (target if target.suffix else target.with_suffix(".zip")).is_file()
    assert PWM.load(str(target), device="cpu").num_timesteps == 25
    if target.suffix == ".zip":
        target.rename(target.with_name("run.1.zip"))
        assert PWM.load(target.with_name("run.1"), device="cpu").num_timesteps == 25


def test_open_files_work(saved: Any):
    agent, _ = saved
    file = io.BytesIO()
    agent.save(file)
    file.seek(0)
    assert PWM.load(file, device="cpu").num_timesteps == 25


def test_classes_of_torch_travel_by_name(make_agent: Any, toy: Any, tmp_path: Any):
    kwargs = {
        "net_arch": {"pi": [8], "qf": [16]},
        "activation_fn": nn.ReLU,
        "optimizer_class": torch.optim.AdamW,
        "world_model_kwargs": {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16},
    }
    make_agent(toy(), policy_kwargs=kwargs).learn(15).save(tmp_path / "agent")
    assert PWM.load(tmp_path / "agent", device="cpu").policy_kwargs.items() >= kwargs.items()


def test_n_step_agents_go_on_from_a_file(make_agent: Any, toy: Any, tmp_path: Any):
    make_agent(toy(), n_steps=3).learn(20).save(tmp_path / "agent")
    loaded = PWM.load(tmp_path / "agent", env=toy(), device="cpu").learn(20)
    assert loaded._n_updates == 2 + 2
    assert loaded.replay_buffer.sample(4).rewards.shape == (4, 1)


class Wave(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


def test_what_has_no_plain_form_is_pickled_and_asks_for_trust(make_agent: Any, toy: Any, tmp_path: Any):
    noise = NormalActionNoise(np.zeros(2), np.full(2, 0.1))
    kwargs = {"activation_fn": Wave, "world_model_kwargs": {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16}}
    make_agent(toy(), policy_kwargs=kwargs, action_noise=noise).learn(15).save(tmp_path / "agent")
    message = r"got pickled ones for 'action_noise', 'policy_kwargs'; unpickling can run any code.*trust_pickle=True"
    with pytest.raises(UnsafeFileError, match=message):
        PWM.load(tmp_path / "agent")
    trusted = PWM.load(tmp_path / "agent", device="cpu", trust_pickle=True)
    assert trusted.policy_kwargs.items() >= kwargs.items()
    np.testing.assert_array_equal(trusted.action_noise._sigma, noise._sigma)
    given = PWM.load(tmp_path / "agent", device="cpu", custom_objects={"policy_kwargs": kwargs, "action_noise": None})
    assert given.action_noise is None


# Damaged


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.5, 0.75, 0.99, 1.0])
def test_truncated_files_are_refused(share: float, saved: Any, tmp_path: Any):
    _, path = saved
    content = path.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: min(int(len(content) * share), len(content) - 1)])
    with pytest.raises(ValueError, match=r"expected a complete agent in '.*cut.*', got a truncated or damaged file"):
        PWM.load(tmp_path / "cut")


def test_a_flipped_bit_is_noticed(saved: Any):
    _, path = saved
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("policy.pth")
    content[info.header_offset + info.compress_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged file"):
        PWM.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": None},
        {"data": b"{"},
        {"data": b"[]"},
        {"data": b"{}"},
        {"data": b"\xff\xfe"},
        {"policy.pth": None},
        {"policy.pth": b"no weights"},
        {"policy.actor_optimizer.pth": None},
    ],
    ids=str,
)
def test_files_with_parts_missing_are_refused(changes: dict[str, bytes | None], saved: Any):
    _, path = saved
    rewrite(path, changes)
    with pytest.raises(ValueError, match=r"expected|do not match"):
        PWM.load(path)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("policy_class", {"!class": "os:system"}),
        ("policy_class", {"!class": "pwm_gym.serialization:os"}),
        ("policy_class", {"!class": "pwm_gym.nothing:Here"}),
        ("policy_class", {"!class": "torch.nn:Linear"}),
        ("policy_kwargs", {"net_arch": "wide"}),
        ("observation_space", {"!space": {"Box": 1}}),
        ("random_state", {"numpy": {}}),
        ("random_state", {"numpy": 1, "torch": 2}),
    ],
    ids=str,
)
def test_tampered_entries_are_refused(name: str, entry: Any, saved: Any):
    _, path = saved
    rewrite(path, {"data": json.dumps({**entries_of(path), name: entry}).encode()})
    with pytest.raises(ValueError, match="expected|must be for a PCG64"):
        PWM.load(path, device="cpu")


def test_a_file_of_another_agent_is_refused(make_agent: Any, toy: Any, saved: Any, tmp_path: Any):
    SAC("MlpPolicy", toy(), device="cpu", policy_kwargs={"net_arch": [8]}, buffer_size=10).save(tmp_path / "sac")
    with pytest.raises(UnsafeFileError, match="expected plain JSON entries"):
        PWM.load(tmp_path / "sac")
    _, path = saved
    make_agent(toy(spaces.Box(-1.0, 1.0, (4,), np.float32))).save(tmp_path / "wider")
    with zipfile.ZipFile(tmp_path / "wider.zip") as archive:
        rewrite(path, {"policy.pth": archive.read("policy.pth")})
    with pytest.raises(ValueError, match=r"(?s)of another agent.*size mismatch"):
        PWM.load(path, device="cpu")


def test_a_missing_file_is_named(tmp_path: Any):
    with pytest.raises(FileNotFoundError, match="nothing.zip"):
        PWM.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observation_space": spaces.Box(-1.0, 1.0, (4,), np.float32)}, "Observation spaces do not match"),
        ({"action_space": spaces.Box(-2.0, 2.0, (2,), np.float32)}, "Action spaces do not match"),
    ],
    ids=["observations", "actions"],
)
def test_an_env_of_other_spaces_is_refused(arguments: dict[str, Any], message: str, saved: Any, toy: Any):
    agent, path = saved
    with pytest.raises(ValueError, match=message):
        PWM.load(path, env=toy(**arguments), device="cpu")
    with pytest.raises(ValueError, match=message):
        agent.set_env(toy(**arguments))
    assert agent.learn(5, reset_num_timesteps=False).num_timesteps == 30


def test_a_wrong_env_is_not_called_a_damaged_file(saved: Any):
    with pytest.raises(ValueError, match="not a Gymnasium environment"):
        PWM.load(saved[1], env=object(), device="cpu")


# Malicious


def pickled_by_torch(payload: Any) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


@pytest.mark.parametrize("entry", ["policy.pth", "policy.model_optimizer.pth", "pytorch_variables.pth"])
@pytest.mark.parametrize("write", [pickle.dumps, pickled_by_torch], ids=["bare pickle", "torch.save"])
def test_malicious_weights_are_not_executed(entry: str, write: Callable[[Any], bytes], saved: Any, tmp_path: Any):
    _, path = saved
    executed = tmp_path / "executed"
    rewrite(path, {entry: write({"weight": Malicious(executed)})})
    for trust_pickle in (False, True):  # weights are never unpickled
        with pytest.raises(UnsafeFileError, match=r"expected only tensors among the weights.*nothing was executed"):
            PWM.load(path, device="cpu", trust_pickle=trust_pickle)
    assert not executed.exists()


@pytest.mark.parametrize("entry", ["learning_rate", "policy_class", "observation_space", "random_state", "unheard_of"])
def test_malicious_entries_are_not_executed_without_trust(entry: str, saved: Any, tmp_path: Any):
    _, path = saved
    executed = tmp_path / "executed"
    payload = base64.b64encode(cloudpickle.dumps(Malicious(executed))).decode()
    rewrite(path, {"data": json.dumps({**entries_of(path), entry: {":serialized:": payload}}).encode()})
    with pytest.raises(UnsafeFileError, match=rf"got pickled ones for '{entry}'.*custom_objects=.'{entry}'"):
        PWM.load(path)
    if entry in ("learning_rate", "unheard_of"):  # replaced entries are not looked at
        PWM.load(path, device="cpu", custom_objects={entry: 1e-3})
        PWM.load(path, device="cpu", **{entry: 1e-3})
    assert not executed.exists()
    if entry == "unheard_of":  # the test's own check: on request it is executed
        PWM.load(path, device="cpu", trust_pickle=True)
        assert executed.exists()


# Atomic


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
def test_a_kill_while_saving_keeps_the_old_file(
    error: Any, saved: Any, monkeypatch: pytest.MonkeyPatch, differences: Any
):
    agent, path = saved
    before = path.read_bytes()
    older = copy.deepcopy(PWM.load(path, device="cpu"))
    agent.learn(10, reset_num_timesteps=False)
    write, calls = torch.save, []

    def half(content: Any, file: Any) -> None:
        calls.append(content)
        if len(calls) == 3:
            file.write(b"half of it")
            raise error
        write(content, file)

    monkeypatch.setattr(save_util.th, "save", half)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        agent.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before
    assert differences(older, PWM.load(path, device="cpu")) == []
    monkeypatch.undo()
    agent.save(path)
    assert differences(agent, PWM.load(path, device="cpu")) == []
