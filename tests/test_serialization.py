"""Files that never execute code: round trips of every form, atomic writes, and refused attacks."""

import json
import os
import pathlib
import pickle
from collections import deque
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.utils import LinearSchedule

from pwm_gym import WorldModel
from pwm_gym.serialization import UnsafeFileError, atomic_write, from_json, is_json_form, load_tensors, to_json


def through_json(value: Any) -> Any:
    return from_json(json.loads(json.dumps(to_json(value))))


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple | deque):
        maxlens = getattr(a, "maxlen", None), getattr(b, "maxlen", None)
        return len(a) == len(b) and maxlens[0] == maxlens[1] and all(map(same, a, b))
    return vars(a) == vars(b) if isinstance(a, LinearSchedule) else a == b


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        2**80,
        0.1,
        float("inf"),
        "text",
        [1, [2.0, "three"]],
        {"a": 1, "b": {"c": [None]}},
        (1, (2, "three")),
        deque([1, 2], maxlen=5),
        deque([(0.5, 1)]),
        np.float32(0.1),
        np.float64(0.1),
        np.int64(-3),
        np.bool_(True),
        np.array(3.0),
        np.zeros((0, 2), np.float32),
        np.array([[1.5]]),
        np.full((2, 3), 7, np.uint8),
        np.array([[0.1, -np.inf], [np.nan, 2.0]], np.float32),
        np.array([np.nan, np.nan]),
        np.array([2**62, -1]),
        np.array([True, False]),
        torch.device("cpu"),
        torch.device("cuda:1"),
        LinearSchedule(1e-3, 0.0, 0.5),
        torch.nn.ReLU,
        torch.optim.Adam,
        stable_baselines3.common.buffers.ReplayBuffer,
        WorldModel,
        {"nested": [(np.array([1, 2]), deque([np.float32(1.0)]), torch.nn.Tanh)]},
    ],
    ids=repr,
)
def test_value_comes_back_as_it_was(value: Any) -> None:
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1.0, 1.0, (3,), np.float32),
        spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
        spaces.Box(np.array([-1.0, -np.inf, 0.1]), np.array([2.0, 0.5, np.inf]), dtype=np.float64),
        spaces.Box(np.float32(-0.1), np.float32(0.3), (4,), np.float32),
        spaces.Box(0, 255, (8, 8, 3), np.uint8),
        spaces.Box(-1.0, 1.0, (), np.float32),
        spaces.Discrete(5),
        spaces.Discrete(5, start=-2),
        spaces.Discrete(5, dtype=np.int32),
        spaces.MultiDiscrete([3, 4, 4]),
        spaces.MultiDiscrete([3, 4], start=[-1, 2]),
        spaces.MultiDiscrete([[3, 4], [5, 6]], dtype=np.int32),
        spaces.MultiBinary(4),
        spaces.MultiBinary((3, 2)),
        spaces.Dict({"b": spaces.Box(-np.inf, 1.0, (2,)), "a": spaces.Discrete(3, start=1)}),
        spaces.Dict([("b", spaces.Discrete(2)), ("a", spaces.Discrete(3)), ("c", spaces.Discrete(4))]),  # unsorted
        spaces.Dict({"outer": spaces.Dict({"inner": spaces.MultiBinary(2)})}),
    ],
    ids=repr,
)
def test_space_comes_back_as_it_was(space: spaces.Space) -> None:
    restored = through_json(space)
    assert restored == space
    assert type(restored) is type(space)
    assert restored.dtype == space.dtype
    assert restored.shape == space.shape
    if isinstance(space, spaces.Box):
        assert same(restored.low, space.low)
        assert same(restored.high, space.high)
        assert np.array_equal(restored.bounded_below, space.bounded_below)
    if isinstance(space, spaces.Dict):
        assert list(restored.spaces) == list(space.spaces)  # features are concatenated in this order


def test_equal_bounds_are_stored_once() -> None:
    assert len(json.dumps(to_json(spaces.Box(-1.0, 1.0, (10_000,))))) < 200


def test_restored_arrays_can_be_written_to() -> None:
    array = through_json(np.zeros((3, 2)))
    array[1] = 1.0
    assert array.sum() == 2.0


class Local:
    pass


@pytest.mark.parametrize(
    "value",
    [
        lambda: 0,
        object(),
        torch.zeros(2),
        Local,
        pathlib.Path,
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Dict({"text": spaces.Text(3)}),
        {1: "a key that is no string"},
        {"!space": "a key that looks like a form"},
        np.array([None]),
        np.array([1j]),
        [{"deep": (lambda: 0,)}],
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_without_a_plain_form_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="has no plain JSON form"):
        to_json(value)


def test_only_marked_dicts_are_forms() -> None:
    assert is_json_form({"!tuple": []})
    assert not is_json_form({"tuple": []})
    assert not is_json_form(["!tuple"])


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "subprocess:Popen",
        "torch:load",
        "torch.nnx:Module",  # a prefix of a trusted name is not that name
        "pwm_gym_evil:Agent",
        ":",
        "",
        5,
        None,
    ],
)
def test_class_outside_the_trusted_packages_is_refused(name: Any) -> None:
    with pytest.raises(UnsafeFileError, match="expected a class of torch.nn, torch.optim, stable_baselines3, pwm_gym"):
        from_json({"!class": name})


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.modules.module:warnings.catch_warnings",
        "torch.nn.modules.module:Module.__init__.__globals__",
        "pwm_gym.serialization:os.system",
        "pwm_gym.serialization:pathlib.Path",
        "pwm_gym.serialization:from_json",  # trusted, but no class
        "torch.nn:functional",
    ],
)
def test_no_path_leads_out_of_a_trusted_module(name: str) -> None:
    with pytest.raises(ValueError, match="trusted package|damaged"):
        from_json({"!class": name})


def test_refused_class_is_not_imported(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Agent: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsafeFileError, match="it was not imported"):
        from_json({"!class": "evil_module:Agent"})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "form",
    [
        {"!tuple": 5},
        {"!deque": [1]},
        {"!scalar": 1},
        {"!scalar": 1, "dtype": "object"},
        {"!scalar": 1, "dtype": "no such type"},
        {"!array": {}},
        {"!array": {"shape": [3], "dtype": "float32", "values": [1.0, 2.0]}},
        {"!array": {"shape": [1], "dtype": "object", "values": [{}]}},
        {"!device": "no such device"},
        {"!space": 3},
        {"!space": {}},
        {"!space": {"Box": [1, 2], "dtype": "float32"}},
        {"!space": {"Discrete": [-1, 0], "dtype": "int64"}},
        {"!space": {"Tuple": []}},
        {"!class": "torch.nn:NoSuchLayer"},
        {"!class": "torch.nn.no_such_module:Layer"},
        {"!class": "torch.nn:"},
        {"!from the future": 1},
        [{"deep": {"!array": {}}}],
    ],
    ids=str,
)
def test_damaged_form_is_a_value_error(form: Any) -> None:
    with pytest.raises(ValueError):
        from_json(form)


# Files


def test_atomic_write_makes_folders_and_shows_the_file_only_when_it_is_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "runs" / "one" / "model.pt"
    with atomic_write(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    assert os.listdir(path.parent) == ["model.pt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_when_the_block_raises(
    tmp_path: pathlib.Path, error: type[BaseException]
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"new, but not all of it")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pt"]  # no temporary file is left


def test_atomic_write_gives_a_new_files_usual_mode(tmp_path: pathlib.Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    with atomic_write(str(tmp_path / "ours")):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


class Evil:
    """An object whose unpickling creates a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def torch_file(path: pathlib.Path, value: Any) -> None:
    torch.save(value, path)


def pickle_file(path: pathlib.Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value))


def run_torch(path: pathlib.Path) -> Any:
    return torch.load(path, weights_only=False)


def run_pickle(path: pathlib.Path) -> Any:
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize(("write", "run"), [(torch_file, run_torch), (pickle_file, run_pickle)])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: pathlib.Path, write: Any, run: Any) -> None:
    path, created = tmp_path / "file", tmp_path / "created"
    write(path, {"weights": torch.zeros(2), "payload": Evil(created)})
    with pytest.raises(UnsafeFileError, match="nothing was executed"):
        load_tensors(path)
    assert not created.exists()
    run(path)["payload"].close()  # the attack is real: an ordinary reader falls for it
    assert created.exists()


@pytest.fixture
def tensors(tmp_path: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    path = tmp_path / "tensors"
    value = {"a": torch.arange(2000.0), "b": {"c": [1, "two", None], "d": torch.eye(3, dtype=torch.float64)}}
    torch_file(path, value)
    return path, value


def test_tensors_come_back_as_they_were(tensors: tuple[pathlib.Path, dict[str, Any]]) -> None:
    path, value = tensors
    with path.open("rb") as file:
        for loaded in (load_tensors(path), load_tensors(str(path)), load_tensors(file, torch.device("cpu"))):
            assert torch.equal(loaded["a"], value["a"])
            assert torch.equal(loaded["b"]["d"], value["b"]["d"])
            assert loaded["b"]["c"] == value["b"]["c"]


def test_truncated_file_is_a_value_error_wherever_it_was_cut(tensors: tuple[pathlib.Path, dict[str, Any]]) -> None:
    path, _ = tensors
    whole = path.read_bytes()
    for length in [*range(0, 130, 3), *range(130, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or damaged") as caught:
            load_tensors(path)
        assert not isinstance(caught.value, UnsafeFileError)


def test_flipped_bits_of_a_tensor_are_noticed(tensors: tuple[pathlib.Path, dict[str, Any]]) -> None:
    path, value = tensors
    whole = bytearray(path.read_bytes())
    whole[whole.index(value["a"].numpy().tobytes()) + 4000] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="wrong checksum"):
        load_tensors(path)


@pytest.mark.parametrize("content", [b"not a checkpoint at all", b"PK", b"PK\x03\x04" + bytes(100), b"{}"])
def test_foreign_file_is_a_value_error(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_tensors(tmp_path / "file")


def test_missing_file_is_a_file_not_found_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "nothing")
