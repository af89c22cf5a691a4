"""Other people's checkpoints: every layout of TD-MPC2's files, and PWM's agents, against their arithmetic."""

import copy
import hashlib
import os
import sys
import threading
import types
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces

import pwm_gym
from pwm_gym import (
    UnsafeFileError,
    WorldModel,
    WorldModelConfig,
    export_tdmpc2,
    load_pwm,
    load_pwm_agent,
    load_tdmpc2,
)
from pwm_gym.checkpoints.layers import latent_order
from pwm_gym.task_sets import TASK_DIMS

OBS, ACT, Z, GROUP, ENC, MLP, BINS, Q, TASKS, EMB = 5, 3, 16, 8, 12, 10, 7, 3, 4, 6
ACTION_DIMS = (1, 3, 2, 3)
ORDER = latent_order(Z, GROUP)


# Files as TD-MPC2's code writes them, and what its code computes from them


def tensor(generator, *shape, scale=1.0, shift=0.0):
    return torch.randn(shape, generator=generator) * scale + shift


def net(generator, name, widths, normed, members=()):
    """Keys of one network in the current layout: linear maps, with a LayerNorm under "ln" in the first `normed`."""
    state = {}
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        state[f"{name}.{i}.weight"] = tensor(generator, *members, outputs, inputs, scale=inputs**-0.5)
        state[f"{name}.{i}.bias"] = tensor(generator, *members, outputs, scale=0.3)
        if i < normed:
            state[f"{name}.{i}.ln.weight"] = tensor(generator, *members, outputs, scale=0.3, shift=1.0)
            state[f"{name}.{i}.ln.bias"] = tensor(generator, *members, outputs, scale=0.3)
    return state


def tdmpc2_state(tasks=0, observation_dim=OBS, action_dim=ACT, action_dims=ACTION_DIMS, termination=False, seed=0):
    """Random weights of TD-MPC2's world model in its current layout."""
    g = torch.Generator().manual_seed(seed)
    emb = EMB if tasks else 0
    pair = Z + emb + action_dim
    state = {}
    if tasks:
        embedding = tensor(g, tasks, emb)
        norms = torch.linspace(0.3, 2.0, tasks)  # below and above the largest that counts, 1
        state["_task_emb.weight"] = embedding * (norms / embedding.norm(dim=1))[:, None]
        state["_action_masks"] = (torch.arange(action_dim) < torch.tensor(action_dims)[:, None]).float()
    state |= net(g, "_encoder.state", [observation_dim + emb, ENC, ENC, Z], 3)
    state |= net(g, "_dynamics", [pair, MLP, MLP, Z], 3)
    state |= net(g, "_reward", [pair, MLP, MLP, BINS], 2)
    if termination:
        state |= net(g, "_termination", [Z + emb, MLP, MLP, 1], 2)
    state |= net(g, "_pi", [Z + emb, MLP, MLP, 2 * action_dim], 2)
    for name in ("_Qs.params", "_target_Qs_params"):
        state |= net(g, name, [pair, MLP, MLP, BINS], 2, (Q,))
    state |= {name.replace("_Qs.", "_detach_Qs_"): t for name, t in state.items() if name.startswith("_Qs.")}
    for name in ("_Qs.params", "_detach_Qs_params", "_target_Qs_params"):
        state |= {f"{name}.__batch_size": torch.Size([Q]), f"{name}.__device": None}
    return state | {"log_std_min": torch.tensor(-10.0), "log_std_dif": torch.tensor(12.0)}


def with_meta_copies(state):
    """As tensordict 0.15 saves: no bookkeeping, and the ensemble's template without values."""
    state = {name: value for name, value in state.items() if "__" not in name}
    template = {n.replace("params", "module"): t[0].to("meta") for n, t in state.items() if n.startswith("_Qs.params")}
    copies = {f"_{kind}{name[1:]}": value for name, value in template.items() for kind in ("detach_Q", "target_Q")}
    return state | template | {name.replace("_QQs", "_Qs"): value for name, value in copies.items()}


def original(state):
    """TD-MPC2's layout until 2025: flat lists for the values, no buffers."""
    kept = {
        n: v for n, v in state.items() if not n.startswith(("_Qs", "_target_Qs", "_detach_Qs", "_action", "log_std"))
    }
    for ours, theirs in (("_Qs.params.", "_Qs.params."), ("_target_Qs_params.", "_target_Qs.params.")):
        values = [v for n, v in state.items() if n.startswith(ours) and "__" not in n]
        kept |= {f"{theirs}{i}": value for i, value in enumerate(values)}
    return kept


def nested(state):
    """The layout before the first release: numbered entries of Sequentials, "0.0" linear and "0.1" LayerNorm."""
    renamed = {}
    for name, value in original(state).items():
        block, _, kind = name.rpartition(".")
        if name.startswith(("_encoder", "_dynamics", "_reward", "_pi")):
            renamed[f"{block[:-3]}.1.{kind}" if block.endswith(".ln") else f"{block}.0.{kind}"] = value
        else:
            renamed[name] = value
    return renamed


def flat(state):
    """The same without nesting: 0 linear, 1 LayerNorm, 2 activation, 3 linear, and so on, behind a first entry."""
    renamed = {}
    for name, value in original(state).items():
        if name.startswith(("_encoder", "_dynamics", "_reward", "_pi")):
            head, number, kind = name.replace(".ln.", "_ln.").rsplit(".", 2)
            place = 3 * int(number.removesuffix("_ln")) + number.endswith("_ln") + 1
            renamed[f"{head}.{place}.{kind}"] = value
        else:
            renamed[name] = value
    return renamed


LAYOUTS = {"current": dict, "meta copies": with_meta_copies, "original": original, "nested": nested, "flat": flat}


def simnorm(x):
    return F.softmax(x.unflatten(-1, (-1, GROUP)), -1).flatten(-2)  # neighbours form a group


def run(state, name, x, last=None):
    """Run a network of the current layout as TD-MPC2 does: linear, LayerNorm, Mish or `last`."""
    count = len({n.removeprefix(f"{name}.").split(".")[0] for n in state if n.startswith(f"{name}.") and "__" not in n})
    for i in range(count):
        weight, bias = state[f"{name}.{i}.weight"], state[f"{name}.{i}.bias"]
        x = x @ weight.transpose(-1, -2) + (bias if weight.ndim == 2 else bias[:, None])
        if f"{name}.{i}.ln.weight" in state:
            scale, shift = state[f"{name}.{i}.ln.weight"], state[f"{name}.{i}.ln.bias"]
            if weight.ndim == 3:
                scale, shift = scale[:, None], shift[:, None]
            x = F.layer_norm(x, x.shape[-1:]) * scale + shift
            x = last(x) if last is not None and i == count - 1 else F.mish(x)
    return x


def decode(logits):
    expectation = F.softmax(logits, -1) @ torch.linspace(-10, 10, logits.shape[-1])
    return expectation.sign() * (expectation.abs().exp() - 1)


def predict(state, observations, actions, task):
    """What TD-MPC2's code predicts."""
    parts = []
    if task is not None:
        embedding = state["_task_emb.weight"][task]
        parts = [embedding * (1 / embedding.norm(dim=-1, keepdim=True)).clamp(max=1)]
    z = run(state, "_encoder.state", torch.cat([observations, *parts], -1), simnorm)
    pair = torch.cat([z, *parts, actions], -1)
    mean, log_std = run(state, "_pi", torch.cat([z, *parts], -1)).chunk(2, -1)
    mask = state["_action_masks"][task] if task is not None else torch.ones_like(mean)
    return {
        "encode": z,
        "next": run(state, "_dynamics", pair, simnorm),
        "reward": decode(run(state, "_reward", pair)),
        "q": decode(run(state, "_Qs.params", pair)),
        "q_target": decode(run(state, "_target_Qs_params", pair)),
        "prior_mean": torch.tanh(mean * mask),
        "prior_log_std": (-10 + 6 * (torch.tanh(log_std) + 1)) * mask,
    }


@torch.no_grad()
def assert_agrees(
    model, state, tasks, names=("encode", "next", "reward", "q", "q_target", "prior_mean", "prior_log_std")
):
    g = torch.Generator().manual_seed(1)
    observations, actions = tensor(g, 8, model.config.observation_dim), tensor(g, 8, model.config.action_dim).tanh()
    task = torch.arange(8) % tasks if tasks else None
    if tasks:
        actions = actions * model.action_mask(task)
    expected = predict(state, observations, actions, task)
    z = model.encode(observations, task)
    got = {"encode": z, "next": model.next(z, actions, task), "reward": model.reward(z, actions, task)}
    if "q" in names:
        got |= {"q": model.q(z, actions, task), "q_target": model.q(z, actions, task, target=True)}
        got |= {"prior_mean": model.prior(z, task).mean, "prior_log_std": model.prior(z, task).log_std}
    for name in names:
        wanted = expected[name][..., ORDER] if name in ("encode", "next") else expected[name]
        torch.testing.assert_close(got[name], wanted, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def write(path, state):
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tasks", [0, TASKS])
def test_every_layout_predicts_what_tdmpc2_does(tmp_path, layout, tasks):
    state = tdmpc2_state(tasks)
    model = load_tdmpc2(write(tmp_path / "a.pt", LAYOUTS[layout](state)))
    config = model.config
    assert (config.observation_dim, config.action_dim, config.latent_dim, config.num_q) == (OBS, ACT, Z, Q)
    assert (config.encoder_dim, config.encoder_layers, config.mlp_dim, config.num_bins) == (ENC, 2, MLP, BINS)
    assert (config.num_tasks, config.conditioning_dim) == (tasks, EMB if tasks else 0)
    assert config.policy_prior and not config.termination_head and not model.training
    if tasks and layout not in ("current", "meta copies"):  # those without masks in the file
        assert config.action_dims == ()
        state = state | {"_action_masks": torch.ones(TASKS, ACT)}
    assert_agrees(model, state, tasks)


def test_state_dict_without_a_model_key_is_read(tmp_path):
    state = tdmpc2_state()
    torch.save(state, tmp_path / "a.pt")
    assert_agrees(load_tdmpc2(tmp_path / "a.pt"), state, 0)


def test_values_and_prior_are_kept_only_where_the_file_has_them(tmp_path):
    state = {n: v for n, v in tdmpc2_state().items() if "Qs" not in n and not n.startswith(("_pi", "log_std"))}
    model = load_tdmpc2(write(tmp_path / "a.pt", state))
    assert model.value is None and model.policy_prior is None
    assert_agrees(model, tdmpc2_state(), 0, ("encode", "next", "reward"))


def test_values_without_targets_become_their_own_targets(tmp_path):
    state = {n: v for n, v in tdmpc2_state().items() if not n.startswith("_target")}
    model = load_tdmpc2(write(tmp_path / "a.pt", state))
    z, actions = torch.rand(4, Z), torch.rand(4, ACT)
    assert torch.equal(model.q(z, actions), model.q(z, actions, target=True))


def test_termination_head_is_read_and_switched_on(tmp_path):
    state = tdmpc2_state(termination=True)
    model = load_tdmpc2(write(tmp_path / "a.pt", state))
    z = torch.rand(4, Z)
    expected = torch.sigmoid(run(state, "_termination", z)).squeeze(-1)
    assert model.predicts_termination
    torch.testing.assert_close(model.termination(z[:, ORDER]), expected, rtol=1e-5, atol=1e-6)


def test_termination_head_that_was_never_trained_stays_off(tmp_path):
    state = tdmpc2_state(termination=True)
    state |= {n: torch.zeros_like(v) for n, v in state.items() if n.startswith("_termination") and n.endswith("bias")}
    assert not load_tdmpc2(write(tmp_path / "a.pt", state)).predicts_termination


def test_embeddings_longer_than_1_are_kept_as_they_are_and_scaled_when_looked_up(tmp_path):
    state = tdmpc2_state(TASKS)
    model = load_tdmpc2(write(tmp_path / "a.pt", state))
    assert torch.equal(model.task_embedding.weight, state["_task_emb.weight"])
    norms = model.embedding(torch.arange(TASKS)).norm(dim=-1)
    torch.testing.assert_close(norms, state["_task_emb.weight"].norm(dim=-1).clamp(max=1.0))


def test_loading_draws_no_random_numbers(tmp_path):
    write(tmp_path / "a.pt", tdmpc2_state())
    before = torch.get_rng_state()
    load_tdmpc2(tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), before)


# Tasks and spaces


def mt30_state():
    dims = [TASK_DIMS[name].action for name in pwm_gym.tasks("MT30")]
    return tdmpc2_state(30, 24, 6, dims)


def test_published_task_sets_tell_names_padding_and_discounts(tmp_path):
    config = load_tdmpc2(write(tmp_path / "a.pt", original(mt30_state())), tasks="MT30").config
    assert config.tasks == pwm_gym.tasks("MT30")
    assert config.observation_dims[:5] == (24, 24, 24, 17, 6) and config.action_dims[:5] == (6, 6, 6, 6, 2)
    assert set(config.discounts) == {0.99}


def test_one_task_of_a_multi_task_file_predicts_the_same_without_padding(tmp_path):
    model = load_tdmpc2(write(tmp_path / "a.pt", mt30_state()), tasks="MT30")
    single = model.for_task("reacher-easy")
    observations, actions = torch.randn(4, 6), torch.rand(4, 2)
    z = model.encode(F.pad(observations, (0, 18)), 4)
    torch.testing.assert_close(single.encode(observations), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        single.reward(z, actions), model.reward(z, F.pad(actions, (0, 4)), 4), rtol=1e-5, atol=1e-5
    )


def test_own_task_names_take_their_padding_from_the_files_masks(tmp_path):
    config = load_tdmpc2(write(tmp_path / "a.pt", tdmpc2_state(TASKS)), tasks=["a", "b", "c", "d"]).config
    assert (config.tasks, config.action_dims) == (("a", "b", "c", "d"), ACTION_DIMS)


def test_meta_world_values_have_their_shorter_episodes_discount(tmp_path):
    tasks = ["walker-walk", "mw-reach"]
    state = tdmpc2_state(2, 39, 6, (6, 4))
    assert load_tdmpc2(write(tmp_path / "a.pt", state), tasks=tasks).config.discounts == (0.99, 0.95)


@pytest.mark.parametrize(
    "tasks, message",
    [
        ("MT30", "names of the file's 4 tasks, got 30 in tasks='MT30'"),
        (["a", "b"], "names of the file's 4 tasks, got 2"),
        ("MT31", "MT30"),
        (["walker-walk", "hopper-hop", "cup-catch", "fish-swim"], r"\(1, 3, 2, 3\) action dimensions.*\(6, 4, 2, 5\)"),
    ],
)
def test_tasks_that_do_not_fit_the_file_are_refused(tmp_path, tasks, message):
    write(tmp_path / "a.pt", tdmpc2_state(TASKS))
    with pytest.raises(ValueError, match=message):
        load_tdmpc2(tmp_path / "a.pt", tasks=tasks)


def test_spaces_are_taken_where_they_fit_and_refused_where_not(tmp_path):
    write(tmp_path / "a.pt", tdmpc2_state())
    observation_space = spaces.Box(-1.0, 1.0, (OBS,), np.float32)
    action_space = spaces.Box(-2.0, 2.0, (ACT,), np.float32)
    model = load_tdmpc2(tmp_path / "a.pt", observation_space=observation_space, action_space=action_space)
    assert model.observation_space == observation_space and model.action_space == action_space
    with pytest.raises(ValueError, match=f"observation_dim {OBS}.*got one of 9"):
        load_tdmpc2(tmp_path / "a.pt", observation_space=spaces.Box(-1.0, 1.0, (9,), np.float32))
    with pytest.raises(ValueError, match=f"action_dim {ACT}.*9"):
        load_tdmpc2(tmp_path / "a.pt", action_space=spaces.Box(-1.0, 1.0, (9,), np.float32))


# Export


@pytest.mark.parametrize("layout, form", [("current", dict), ("original", original)])
@pytest.mark.parametrize("tasks, termination", [(0, True), (TASKS, False)])
def test_export_writes_back_the_very_file_that_was_read(tmp_path, layout, form, tasks, termination):
    state = form(tdmpc2_state(tasks, termination=termination))
    export_tdmpc2(load_tdmpc2(write(tmp_path / "a.pt", state)), tmp_path / "b.pt", layout)
    written = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(written) == ["model"] and written["model"].keys() == state.keys()
    for name, value in state.items():
        got = written["model"][name]
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, name


def test_our_own_model_survives_the_round_trip(tmp_path):
    config = WorldModelConfig(5, 3, latent_dim=Z, encoder_dim=8, mlp_dim=8, num_q=2, policy_prior=True)
    torch.manual_seed(0)
    model = WorldModel(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    export_tdmpc2(model, tmp_path / "a.pt")
    read = load_tdmpc2(tmp_path / "a.pt")
    assert not read.config.termination_head  # it never saw an episode terminate
    ours = model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in read.state_dict().items())


@pytest.mark.parametrize(
    "fields, layout, message",
    [
        ({}, "current", "expected a value ensemble and a policy prior"),
        ({"regularizer": "none"}, "original", "regularizer 'simnorm'"),
        ({"activation": "relu"}, "original", "activation 'mish'"),
        ({}, "new", "`layout` must be"),
    ],
)
def test_models_that_tdmpc2_has_no_form_for_are_not_exported(tmp_path, fields, layout, message):
    model = WorldModel(WorldModelConfig(5, 3, latent_dim=Z, encoder_dim=8, mlp_dim=8, **fields))
    with pytest.raises(ValueError, match=message):
        export_tdmpc2(model, tmp_path / "a.pt", layout)
    assert not list(tmp_path.iterdir())


def test_normalised_observations_become_part_of_the_encoder(tmp_path):
    config = WorldModelConfig(5, 3, latent_dim=Z, encoder_dim=8, mlp_dim=8, normalize_observations=True)
    torch.manual_seed(0)
    model = WorldModel(config).eval()
    raw = torch.tensor([0.0, 3.0, -2.0, 50.0, 0.0]) + torch.tensor([1.0, 0.1, 5.0, 20.0, 1.0]) * torch.randn(100, 5)
    model.count(raw)
    export_tdmpc2(model, tmp_path / "a.pt", layout="original")
    read = load_tdmpc2(tmp_path / "a.pt")
    assert not read.config.normalize_observations
    torch.testing.assert_close(read.encode(read.preprocess(raw)), model.encode(model.preprocess(raw)))


# Damaged and malicious files


@pytest.mark.parametrize(
    "form, missing, message",
    [
        (dict, ["_dynamics.1.bias"], "'_dynamics.1.bias'"),
        (dict, ["_reward.2.weight"], "'_reward.2.weight'"),
        (dict, ["_pi.0.ln.bias"], "'_pi.0.ln.bias'"),
        (dict, ["_Qs.params.1.weight"], "'_Qs.params.1.weight'"),
        (original, ["_Qs.params.3"], "'_Qs.params.3'"),
        (original, ["_target_Qs.params.8"], "'_target_Qs.params.8'"),
        (dict, ["_encoder.state.0.ln.weight", "_encoder.state.0.ln.bias"], "LayerNorm's weight of '_encoder.state.0'"),
        (dict, [f"_dynamics.1.{kind}" for kind in ("weight", "bias", "ln.weight", "ln.bias")], "3 layers.*got 2"),
        (dict, [f"_reward.{i}.{k}" for i in range(3) for k in ("weight", "bias", "ln.weight", "ln.bias")], "_reward"),
        (dict, ["_task_emb.weight"], "'_task_emb.weight'"),
    ],
)
def test_missing_keys_are_named(tmp_path, form, missing, message):
    state = form(tdmpc2_state(TASKS))
    write(tmp_path / "a.pt", {name: value for name, value in state.items() if name not in missing})
    with pytest.raises(ValueError, match=message):
        load_tdmpc2(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_value.0.weight": torch.zeros(2, 2)}, "got also .'_value.0.weight'"),
        ({"_encoder.rgb.2.weight": torch.zeros(2, 2)}, "one of pixels"),
        ({"_dynamics.1.weight": torch.zeros(MLP, MLP + 1)}, "'_dynamics.1' of shape .10, 10., got .10, 11."),
        ({"_pi.2.weight": torch.zeros(2, MLP)}, "'_pi.2'"),
        ({"_dynamics.0.weight": torch.zeros(MLP, Z - 3)}, "`action_dim` must be >= 1"),
        ({"_reward.2.weight": torch.zeros(1, MLP), "_reward.2.bias": torch.zeros(1)}, "'_Qs.params.2'"),
        ({"_dynamics.mean.weight": torch.zeros(1)}, "numbered layers"),
        ({"log_std_dif": torch.tensor(7.0)}, "'log_std_dif' of 12.0"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path, changes, message):
    write(tmp_path / "a.pt", tdmpc2_state() | changes)
    with pytest.raises(ValueError, match=message):
        load_tdmpc2(tmp_path / "a.pt")


def test_scalar_rewards_of_unknown_units_are_refused(tmp_path):
    state = {n: v for n, v in tdmpc2_state().items() if "Qs" not in n}
    state |= {"_reward.2.weight": torch.zeros(1, MLP), "_reward.2.bias": torch.zeros(1)}
    write(tmp_path / "a.pt", state)
    with pytest.raises(ValueError, match="expected a reward in bins"):
        load_tdmpc2(tmp_path / "a.pt")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, keep):
    content = write(tmp_path / "a.pt", tdmpc2_state()).read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_tdmpc2(tmp_path / "a.pt")


class RunsCode:
    """Pickles as a call of os.system, as a malicious file does."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("load", [load_tdmpc2, load_pwm, load_pwm_agent])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, load):
    marker = tmp_path / "ran"
    content = {"model": tdmpc2_state(), "actor": {}, "critic": {}, "world_model": {}, "ret_rms": RunsCode(marker)}
    torch.save(content, tmp_path / "evil.pt")
    with pytest.raises(UnsafeFileError, match="nothing was imported or executed"):
        load(tmp_path / "evil.pt")
    assert not marker.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # the file is a real one
    assert marker.exists()


@pytest.mark.parametrize("load", [load_tdmpc2, load_pwm])
def test_files_of_something_else_are_refused(tmp_path, load):
    torch.save([torch.zeros(3)], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="expected"):
        load(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt")


# The Hugging Face hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine with one repository, and an empty cache; huggingface_hub's own client asks it."""
    import huggingface_hub.constants

    files = {"multitask/mt4.pt": write(tmp_path / "served.pt", tdmpc2_state(TASKS)).read_bytes()}
    server = HTTPServer(("127.0.0.1", 0), partial(HubHandler, files))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the hub does to `hf_hub_download`: the commit, a checksum, the content."""

    def __init__(self, files, *args):
        self.files = files
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.respond(with_content=False)

    def do_GET(self):
        self.respond(with_content=True)

    def respond(self, with_content):
        repo, _, rest = self.path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        error = None
        if repo != "someone/models":
            error = "RepoNotFound"
        elif revision not in ("main", COMMIT):
            error = "RevisionNotFound"
        elif file not in self.files:
            error = "EntryNotFound"
        self.send_response(404 if error else 200)
        content = b"" if error else self.files[file]
        if error:
            self.send_header("X-Error-Code", error)
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)


def go_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_file_on_the_hub_is_downloaded_once_and_then_found_offline(hub, monkeypatch):
    for address in ("hf://someone/models/multitask/mt4.pt", f"hf://someone/models@{COMMIT}/multitask/mt4.pt"):
        assert_agrees(load_tdmpc2(address), tdmpc2_state(TASKS), TASKS)
    go_offline(monkeypatch)
    assert load_tdmpc2("hf://someone/models/multitask/mt4.pt").config.num_tasks == TASKS


@pytest.mark.parametrize(
    "address",
    ["hf://someone/else/mt4.pt", "hf://someone/models/none.pt", "hf://someone/models@v9/multitask/mt4.pt"],
)
def test_what_the_hub_does_not_have_is_named(hub, address):
    with pytest.raises(FileNotFoundError, match=f"expected '{address}' on the hub, got no such"):
        load_tdmpc2(address)


def test_unknown_address_offline_says_so(hub, monkeypatch):
    go_offline(monkeypatch)
    with pytest.raises(FileNotFoundError, match="'hf://someone/models/mt4.pt' on the hub or in its cache.*Go online"):
        load_tdmpc2("hf://someone/models/mt4.pt")


def test_address_without_a_file_is_refused():
    with pytest.raises(ValueError, match="expected hf://owner/repository/path"):
        load_tdmpc2("hf://someone/models")


def test_missing_huggingface_hub_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'pwm-gym\[hub\]'"):
        load_tdmpc2("hf://someone/models/mt4.pt")


# PWM's agents


class RunningMeanStd:
    """PWM's class of this name, as far as its pickle goes."""

    def __init__(self, mean, var, count=640.0):
        self.shape, self.mean, self.var, self.count = mean.shape, mean, var, count


@pytest.fixture
def statistics(monkeypatch):
    """Let pickles name the class above as PWM's own."""
    monkeypatch.setattr(RunningMeanStd, "__module__", "pwm.utils.running_mean_std")
    for name in ("pwm", "pwm.utils", "pwm.utils.running_mean_std"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["pwm.utils.running_mean_std"].RunningMeanStd = RunningMeanStd
    return RunningMeanStd


def pwm_content(state, action_dim=ACT, seed=5, **statistics):
    """An agent's file: encoder keys without "state", an actor of Linear, Mish, LayerNorm, three stacked critics."""
    g = torch.Generator().manual_seed(seed)
    kept = ("_task_emb", "_encoder", "_dynamics", "_reward")
    world_model = {n.replace("state.", ""): v for n, v in state.items() if n.startswith(kept)}
    blocks = net(g, "n", [Z, 9, 8, action_dim], 2)
    actor = {"logstd": tensor(g, action_dim, scale=0.5, shift=-1.0)}  # the lower bound is -1.427
    for i in range(3):
        actor |= {f"mu_net.{3 * i}.{k}": blocks[f"n.{i}.{k}"] for k in ("weight", "bias")}
        if i < 2:
            actor |= {f"mu_net.{3 * i + 2}.{k}": blocks[f"n.{i}.ln.{k}"] for k in ("weight", "bias")}
    critic = {f"params.{i}": value for i, value in enumerate(net(g, "c", [Z, 7, 1], 1, (3,)).values())}
    content = {"actor": actor, "critic": critic, "world_model": world_model}
    content |= dict.fromkeys(("obs_rms", "rew_rms", "ret_rms")) | statistics
    return content | {"actor_opt": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]}}


def block(x, weight, bias, scale=None, shift=None):
    """Linear, Mish, LayerNorm: the order of PWM's actor and critics."""
    x = x @ weight.transpose(-1, -2) + (bias if weight.ndim == 2 else bias[:, None])
    if scale is None:
        return x
    if weight.ndim == 3:
        scale, shift = scale[:, None], shift[:, None]
    return F.layer_norm(F.mish(x), x.shape[-1:]) * scale + shift


def act(content, z):
    actor = content["actor"]
    for i in (0, 3):
        names = [f"mu_net.{i}.weight", f"mu_net.{i}.bias", f"mu_net.{i + 2}.weight", f"mu_net.{i + 2}.bias"]
        z = block(z, *(actor[name] for name in names))
    return torch.tanh(block(z, actor["mu_net.6.weight"], actor["mu_net.6.bias"]))


def value(content, z):
    p = list(content["critic"].values())
    return block(block(z, *p[:4]), *p[4:]).squeeze(-1)


def single_task_content(statistics):
    """As PWM's dflex runs save: a scalar reward, normalised observations and rewards."""
    state = tdmpc2_state()
    g = torch.Generator().manual_seed(7)
    state |= {"_reward.2.weight": tensor(g, 1, MLP, scale=0.3), "_reward.2.bias": tensor(g, 1)}
    return state, pwm_content(
        state,
        obs_rms=statistics(torch.linspace(-1.0, 1.0, OBS), torch.linspace(0.5, 2.0, OBS)),
        rew_rms=statistics(torch.tensor([1.5]), torch.tensor([4.0])),
        ret_rms=statistics(torch.tensor([-3.0]), torch.tensor([9.0])),
    )


@torch.no_grad()
def test_pwm_world_model_takes_raw_observations_and_predicts_rewards_in_task_units(tmp_path, statistics):
    state, content = single_task_content(statistics)
    torch.save(content, tmp_path / "a.pt")
    model = load_pwm(tmp_path / "a.pt")
    observations, actions = torch.randn(6, OBS), torch.rand(6, ACT)
    mean, std = content["obs_rms"].mean, (content["obs_rms"].var + 1e-5).sqrt()
    z = run(state, "_encoder.state", (observations - mean) / std, simnorm)
    reward = run(state, "_reward", torch.cat([z, actions], -1)).squeeze(-1) * 4.00001**0.5 + 1.5
    torch.testing.assert_close(model.encode(observations), z[:, ORDER], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.reward(z[:, ORDER], actions), reward, rtol=1e-5, atol=1e-5)
    assert model.config.num_bins == 1


@torch.no_grad()
def test_pwm_agent_acts_and_values_as_in_the_file(tmp_path, statistics):
    state, content = single_task_content(statistics)
    torch.save(content, tmp_path / "a.pt")
    agent = load_pwm_agent(tmp_path / "a.pt", gamma=0.9)
    observations = torch.randn(6, OBS)
    z = agent.world_model.encode(observations)
    theirs = torch.empty_like(z)
    theirs[:, ORDER] = z
    actions = torch.as_tensor(agent.predict(observations.numpy(), deterministic=True)[0])
    torch.testing.assert_close(actions, act(content, theirs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(agent.actor.get_std(), content["actor"]["logstd"].clamp(-1.427).exp())
    std = 4.00001**0.5
    expected = value(content, theirs) * std + 1.5 / (1 - 0.9)  # V = σ V' + μ / (1 - γ)
    for critic in (agent.critic, agent.critic_target):
        torch.testing.assert_close(critic.value(z), expected, rtol=1e-5, atol=1e-5)
    scale = agent.policy.return_scale
    torch.testing.assert_close(scale.var, torch.tensor(9.0 * 4.00001))
    torch.testing.assert_close(scale.mean, torch.tensor(3.0 * std + 15.0))


@torch.no_grad()
def test_pwm_agent_of_one_task_acts_in_that_tasks_own_dimensions(tmp_path, statistics):
    state = mt30_state()
    idle = statistics(torch.zeros(1), torch.ones(1), 1e-4)  # made, but never used
    content = pwm_content(state, 6, rew_rms=idle)
    torch.save(content, tmp_path / "a.pt")
    agent = load_pwm_agent(tmp_path / "a.pt", tasks="MT30", task="reacher-easy")
    observations = torch.randn(5, 6)
    z = load_pwm(tmp_path / "a.pt", tasks="MT30").encode(F.pad(observations, (0, 18)), 4)
    theirs = torch.empty_like(z)
    theirs[:, ORDER] = z
    actions = torch.as_tensor(agent.predict(observations.numpy(), deterministic=True)[0])
    torch.testing.assert_close(actions, act(content, theirs)[:, :2], rtol=1e-5, atol=1e-5)
    assert not agent.world_model.config.reward_in_task_units  # its critics know rewards in bin space


def test_pwm_agent_goes_on_learning_in_its_model_and_on_a_real_env(tmp_path):
    state = tdmpc2_state(observation_dim=3, action_dim=1)
    torch.save(pwm_content(state, 1), tmp_path / "a.pt")
    env = gym.make("Pendulum-v1")
    agent = load_pwm_agent(tmp_path / "a.pt", env, batch_size=4, model_batch_size=4, buffer_size=100, learning_starts=4)
    assert agent.observation_space == env.observation_space and agent.action_space == env.action_space
    before = copy.deepcopy(agent.policy.state_dict())
    agent.learn(24)
    changed = {n.split(".")[0] for n, v in agent.policy.state_dict().items() if not torch.equal(v, before[n])}
    assert changed >= {"actor", "critic", "return_scale"}


@pytest.mark.parametrize(
    "part, name, message",
    [
        ("actor", None, r"no \['actor'\]"),
        ("actor", "logstd", "'logstd'"),
        ("actor", "mu_net.3.bias", "'mu_net.3.bias'"),
        ("critic", "params.2", "'params.2'"),
        ("world_model", "_dynamics.0.weight", "'_dynamics.0.weight'"),
    ],
)
def test_what_is_missing_in_an_agents_file_is_named(tmp_path, part, name, message):
    content = pwm_content(tdmpc2_state())
    del (content if name is None else content[part])[name or part]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load_pwm_agent(tmp_path / "a.pt")


def test_other_pickled_objects_than_pwms_statistics_are_refused(tmp_path):
    torch.save(pwm_content(tdmpc2_state(), rew_rms=RunningMeanStd(torch.zeros(1), torch.ones(1))), tmp_path / "a.pt")
    with pytest.raises(UnsafeFileError, match="RunningMeanStd"):  # of this module, not of PWM's
        load_pwm(tmp_path / "a.pt")


def test_normalised_rewards_in_bins_are_refused(tmp_path, statistics):
    torch.save(pwm_content(tdmpc2_state(), rew_rms=statistics(torch.ones(1), torch.ones(1))), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="not normalised"):
        load_pwm(tmp_path / "a.pt")
