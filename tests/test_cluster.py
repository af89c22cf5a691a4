"""Units of work on Ray: the same results as without, retries, what is shared, and what is refused in bounded time."""

from __future__ import annotations

import csv
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from pwm_gym import PWM, OfflineDataset, WorldModel, WorldModelConfig, cli, extract
from pwm_gym import benchmark as side_by_side
from pwm_gym.benchmark import Cell, Study
from pwm_gym.cluster import RayCluster
from pwm_gym.collection import collect
from pwm_gym.datasets import Episode

TASKS = ("Pendulum-v1", "MountainCarContinuous-v0")
DIMS = ((3, 1), (2, 1))  # observations and actions
TINY = {"updates": 4, "num_envs": 4, "checkpoint_every": 2, "horizon": 3, "policy_kwargs": {"net_arch": [8]}}


@pytest.fixture(scope="module")
def ray():
    """Two processors of this machine as a cluster, which `RayCluster` goes on with."""
    pytest.importorskip("ray")
    from pwm_gym.cluster import _import_ray

    module = _import_ray()
    options = {"object_store_memory": 160 * 2**20, "log_to_driver": False, "logging_level": "error"}
    module.init(address="local", num_cpus=2, include_dashboard=False, **options)
    torch.set_num_threads(1)  # as many as a unit gets
    yield module
    module.shutdown()


def make_dataset(length=20) -> OfflineDataset:
    rng = np.random.default_rng(0)

    def episode(task):
        observation, action = DIMS[task]
        observations, actions = rng.normal(size=(length + 1, observation)), rng.uniform(-1, 1, (length, action))
        return Episode(observations, actions, np.ones(length), truncated=True, task=task)

    return OfflineDataset([episode(task) for task in (0, 1) for _ in range(2)], TASKS)


def make_model() -> WorldModel:
    torch.manual_seed(0)
    dims = {"observation_dim": 3, "action_dim": 1, "observation_dims": (3, 2), "action_dims": (1, 1)}
    small = {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 11, "task_dim": 4}
    return WorldModel(WorldModelConfig(**dims, tasks=TASKS, **small)).eval()


def assert_equal_agents(a, b) -> None:
    theirs = PWM.load(b).policy.state_dict()
    for name, value in PWM.load(a).policy.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def work_with(shared):
    """Make a function of the shared value's total; local, so that it travels to workers by value."""
    return lambda unit: unit + float(shared["a"].sum())


def marker_in(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "call.json"
    path.touch()
    return path


# The same results


def test_extraction_gives_the_same_policies_and_scores_bit_for_bit_from_every_seed(ray, tmp_path):
    arguments = {"episodes": 1, **TINY}
    here = extract(make_model(), make_dataset(), out=tmp_path / "here", together=1, seed=[0, 1], **arguments)
    there = extract(make_model(), make_dataset(), out=tmp_path / "there", seed=[0, 1], ray="local", **arguments)
    assert list(here) == list(there) == [f"seed-{seed}/{task}" for seed in (0, 1) for task in TASKS]
    for name, result in here.items():
        assert result.returns == there[name].returns
        assert_equal_agents(result.agent, there[name].agent)
    with (tmp_path / "there/seed-1/table.csv").open() as file:
        assert [row["task"] for row in csv.DictReader(file)] == list(TASKS)
    left = {path.name for path in (tmp_path / "there/seed-0").iterdir()}
    assert not [name for name in left if name.startswith(("progress", "checkpoint"))]


def test_collection_gives_the_same_bytes(ray, tmp_path):
    arguments = {"episodes": 4, "chunk_episodes": 2, "noise": 0.1, "progress_bar": False}
    agent = {"Pendulum-v1": lambda observation: np.array([observation[0]])}
    for name, where in {"here": None, "there": "local"}.items():
        collect("Pendulum-v1", agent, out=tmp_path / name, ray=where, **arguments)
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()


def test_benchmark_gives_the_same_curves_and_keeps_why_a_run_died(ray, tmp_path, capsys):
    arguments = {"sac": {"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "learning_starts": 20}}
    one = {"algorithms": ["sac"], "tasks": ["Pendulum-v1"], "seeds": [0], "every": 200, "episodes": 1}
    outcomes = side_by_side.run(tmp_path / "there", **one, frames=400, arguments=arguments, ray=RayCluster(cpus=0.5))
    assert [outcome.failure for outcome in outcomes] == [None]
    cell = Cell("sac", "Pendulum-v1", 0)
    here = Study(tmp_path / "here", (cell,), {"sac": 400}, 200, 1, arguments)
    here.save()
    from pwm_gym.benchmark.worker import train

    train(here, cell)
    curves = [
        [(row["frames"], row["return_0"]) for row in study.rows(cell)]
        for study in (here, Study.open(tmp_path / "there"))
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 2
    bad = {"sac": {"policy_kwargs": {"net_arch": ["wide"]}}}
    outcomes = side_by_side.run(
        tmp_path / "bad", ["sac"], ["Pendulum-v1"], [0], frames=200, every=200, arguments=bad, ray="local"
    )
    assert "TypeError" in outcomes[0].failure
    assert "400 frames" in capsys.readouterr().out


# What is shared


def test_processes_read_one_copy_of_arrays_and_weights(ray, tmp_path):
    def prepare(shared):
        model, array = shared
        first = next(model.parameters())
        return lambda unit: (
            array.flags.writeable,
            first.data_ptr() % 64,
            float(first.detach().sum()),
            model.config.tasks,
        )

    shared = make_model(), np.zeros(1000)
    (event,) = filter(None, RayCluster().run(prepare, shared, [0], marker_in(tmp_path)))
    writeable, offset, total, tasks = event.result
    assert not writeable
    assert offset == 0  # where Ray's store puts buffers
    assert (total, tasks) == (float(next(shared[0].parameters()).detach().sum()), TASKS)


def test_one_task_of_a_shared_model_copies_its_first_layers_only():
    model = make_model()
    weights = {value.data_ptr() for value in model.state_dict().values()}
    own = [
        name for name, value in model.for_task(0, share=True).state_dict().items() if value.data_ptr() not in weights
    ]
    assert {name.rpartition(".")[0] for name in own} == {
        f"{part}.0.0" for part in ("encoder", "dynamics", "reward_head", "termination_head")
    }
    assert not {value.data_ptr() for value in model.for_task(0).state_dict().values()} & weights


def test_mapped_dataset_travels_as_the_place_of_its_files(tmp_path):
    import pickle

    make_dataset().save(tmp_path / "data")
    view = OfflineDataset.load(tmp_path / "data").of_tasks(TASKS[1])
    content = pickle.dumps(view)
    assert os.fsencode(tmp_path) in content and len(content) < 3_000
    windows = [one.sample_windows(4, 3, np.random.default_rng(0)) for one in (view, pickle.loads(content))]
    assert torch.equal(windows[0].observations, windows[1].observations)


# Failures


def test_unit_whose_process_was_killed_is_begun_again_and_others_go_on_when_one_fails(ray, tmp_path):
    def prepare(folder):
        def work(unit):
            with (folder / f"{unit}.txt").open("a") as file:
                file.write("begun\n")
            if unit == "killed" and (folder / "killed.txt").read_text().count("\n") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if unit == "wrong":
                raise ArithmeticError("seven")
            return unit

        return work

    units = ["killed", "wrong", "right"]
    events = {e.number: e for e in RayCluster(retries=1).run(prepare, tmp_path, units, marker_in(tmp_path)) if e}
    assert [events[i].result for i in (0, 2)] == ["killed", "right"]
    assert events[1].failure == "ArithmeticError: seven"
    assert [(tmp_path / f"{unit}.txt").read_text().count("begun") for unit in units] == [2, 1, 1]


def test_unit_that_kills_its_process_every_time_fails_alone(ray, tmp_path):
    def prepare(_):
        return lambda unit: os.kill(os.getpid(), signal.SIGKILL) if unit else "done"

    events = {e.number: e for e in RayCluster(retries=0).run(prepare, None, [1, 0], marker_in(tmp_path)) if e}
    assert events[0].failure.startswith("WorkerCrashedError")
    assert events[1].result == "done"


def test_a_policy_that_fails_is_named_when_the_others_are_done(ray, tmp_path):
    arguments = {**TINY, "episodes": 0, "learning_rate": 1e38}
    with pytest.raises(ValueError, match="2 of 2 units of work failed.*Pendulum-v1: ValueError: expected finite"):
        extract(make_model(), make_dataset(), out=tmp_path, ray="local", **arguments)


def test_more_than_any_node_has_is_refused(ray, tmp_path):
    with pytest.raises(ValueError, match="a node with the 3 CPUs and 2 GPUs of a unit, got 1 nodes with 2 CPUs"):
        list(RayCluster(cpus=3, gpus=2).run(work_with, {}, [0], marker_in(tmp_path)))


def test_node_without_the_folder_is_refused(ray, tmp_path):
    with pytest.raises(ValueError, match="expected every node to see the run's folder, got a node, .*without .*gone"):
        list(RayCluster().run(work_with, {"a": np.zeros(1)}, [0], tmp_path / "gone"))


def test_node_without_the_dataset_is_refused(ray, tmp_path):
    make_dataset().save(tmp_path / "data")
    dataset = OfflineDataset.load(tmp_path / "data")
    (tmp_path / "data/actions.npy").unlink()
    with pytest.raises(ValueError, match=r"expected to begin on .*damaged one .*actions\.npy"):
        list(RayCluster().run(work_with, {"a": dataset}, [0, 1], marker_in(tmp_path)))


def test_node_of_another_version_is_refused(ray, tmp_path, monkeypatch):
    monkeypatch.setattr("pwm_gym.cluster.source_checksum", lambda: "0badcafe")
    with pytest.raises(ValueError, match="expected the same versions on every node, got.*source '0badcafe' and"):
        list(RayCluster().run(work_with, {}, [0], marker_in(tmp_path)))


def test_address_where_nothing_is_gives_an_error_at_once():
    pytest.importorskip("ray")
    began = time.monotonic()
    program = (
        "import sys\nfrom pwm_gym.cluster import RayCluster\nlist(RayCluster(sys.argv[1]).run(print, 0, [0], 'x'))"
    )
    done = subprocess.run([sys.executable, "-c", program, "127.0.0.1:1"], capture_output=True, text=True)
    assert "ConnectionError: expected a Ray cluster at '127.0.0.1:1', got none" in done.stderr
    assert time.monotonic() - began < 40


@pytest.mark.expensive  # 20 s of waiting
def test_port_that_speaks_something_else_gives_an_error_in_bounded_time():
    pytest.importorskip("ray")
    from pwm_gym.cluster import _check_address

    told = pytest.raises(ConnectionError, match="got nothing that answers as one")
    with socket.create_server(("127.0.0.1", 0)) as server, told:
        _check_address(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("given", [{"address": "ray://head:10001"}, {"address": "head"}, {"cpus": 0}, {"retries": -1}])
def test_wrong_arguments_are_refused(given):
    with pytest.raises(ValueError, match="expected"):
        RayCluster(**given)


# Without Ray


def test_ray_is_never_imported_unless_asked_for():
    program = "import sys, pwm_gym, pwm_gym.cluster, pwm_gym.cli, pwm_gym.benchmark, pwm_gym.collection\n"
    subprocess.run([sys.executable, "-c", program + "assert 'ray' not in sys.modules"], check=True)


def test_asking_for_a_cluster_without_ray_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["collect", "Pendulum-v1", "--episodes", "1", "--out", str(tmp_path / "data"), "--ray", "local"])
    assert 'pip install "pwm-gym[ray]"' in capsys.readouterr().err


# Two nodes


def start_nodes(count: int = 2):
    """Begin a cluster of nodes with one processor each, on this machine."""
    pytest.importorskip("ray")
    from pwm_gym.cluster import _import_ray

    _import_ray().shutdown()
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets them starve on a busy machine
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_log_monitor": False}
    head = {"include_dashboard": False, "no_monitor": True, **options}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    return cluster, [cluster.add_node(**options) for _ in range(count - 1)]


@pytest.mark.expensive
def test_run_completes_when_a_node_is_killed_with_nothing_lost_or_done_twice(tmp_path):
    cluster, (node,) = start_nodes()
    arguments = {**TINY, "updates": 60, "checkpoint_every": 10, "episodes": 1, "seed": [0, 1]}
    done_before: dict[pathlib.Path, float] = {}

    def kill() -> None:
        done, begun = [], []
        while not done or len(begun) < len(done) + 2:  # a unit is done, and both nodes are at work on others
            done = [path for task in TASKS for path in tmp_path.glob(f"there/*/{task}.json")]
            begun = list(tmp_path.glob("there/*/checkpoint-*.pt"))
            time.sleep(0.02)
        done_before.update({path: path.stat().st_mtime for path in done})
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        torch.set_num_threads(1)
        there = extract(make_model(), make_dataset(), out=tmp_path / "there", ray=cluster.address, **arguments)
    finally:
        killer.join()
        cluster.shutdown()
    here = extract(make_model(), make_dataset(), out=tmp_path / "here", together=1, **arguments)
    assert list(there) == list(here)
    for name, result in here.items():
        assert result.returns == there[name].returns
        assert_equal_agents(result.agent, there[name].agent)
    assert done_before and all(path.stat().st_mtime == then for path, then in done_before.items())


@pytest.mark.expensive
def test_two_nodes_with_different_versions_are_named(tmp_path):
    root, other = pathlib.Path(__file__).parents[1], tmp_path / "other"
    shutil.copytree(root / "pwm_gym", other / "pwm_gym")
    with (other / "pwm_gym/functional.py").open("a") as file:
        file.write("# changed\n")
    cluster, _ = start_nodes(1)
    program = "import sys\nfrom pwm_gym.cluster import RayCluster\n"
    program += "print([*filter(None, RayCluster(sys.argv[1]).run(lambda _: abs, 0, [-1, -2], sys.argv[2]))])"
    command = [sys.executable, "-c", program, cluster.address, str(marker_in(tmp_path))]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 120}
    try:
        alone = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, **options)
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, env_vars={"PYTHONPATH": str(other)})
        both = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, **options)
    finally:
        cluster.shutdown()
    assert "result=1" in alone.stdout and "result=2" in alone.stdout, alone.stderr
    assert "expected the same versions on every node" in both.stderr and "source" in both.stderr
