"""Other people's torch.save files: what is read, and that nothing of them is executed."""

import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import pytest
import torch

from pwm_gym import UnsafeFileError
from pwm_gym.foreign import ForeignObject, read_torch_file


class RunsCode:
    """Pickles as a call of os.system, as a malicious file does."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Statistics:
    """A foreign object, whose class a reader does not have."""

    def __init__(self):
        self.mean = torch.arange(3.0)


class TensorDict:
    """Pickles as tensordict's class of this name does: a call of `_make_td` with the class and its attributes."""

    def __init__(self, entries, batch_size):
        self.entries, self.batch_size = entries, batch_size

    def __reduce__(self):
        state = {"_tensordict": self.entries, "_batch_size": self.batch_size, "_device": None, "_td_dim_names": None}
        return _make_td, (TensorDict, state)


def _make_td(cls, state):
    raise AssertionError("reading must not call what a file names")


@pytest.fixture
def tensordict_names(monkeypatch):
    """Let pickles name the stand-ins above as tensordict's own."""
    monkeypatch.setattr(TensorDict, "__module__", "tensordict._td")
    monkeypatch.setattr(_make_td, "__module__", "tensordict._reductions")
    for name, entries in {"": {}, "._td": {"TensorDict": TensorDict}, "._reductions": {"_make_td": _make_td}}.items():
        module = types.ModuleType(f"tensordict{name}")
        module.__dict__.update(entries)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def test_plain_dictionaries_of_every_dtype_are_read_as_torch_reads_them(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "transposed": torch.randn(4, 2).T}
    torch.save(tensors, tmp_path / "a.pt")
    assert_equal(read_torch_file(tmp_path / "a.pt"), tensors)


def test_modules_state_parameters_and_views_of_one_storage_are_read(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    net = torch.nn.Linear(2, 3)
    content = {"model": net.state_dict(), "row": base[1], "column": base[:, 2], "p": net.weight, "n": [1, ("a", None)]}
    torch.save(content, tmp_path / "a.pt")
    read = read_torch_file(tmp_path / "a.pt")
    assert type(read["model"]) is dict
    assert_equal(read["model"], dict(net.state_dict()))
    assert_equal({k: read[k] for k in ("row", "column")}, {"row": base[1], "column": base[:, 2]})
    assert torch.equal(read["p"], net.weight) and type(read["p"]) is torch.Tensor
    assert read["n"] == [1, ("a", None)]


def test_tensors_are_views_of_the_file_until_touched(tmp_path):
    torch.save({"x": torch.zeros(1000), "y": torch.zeros(10)}, tmp_path / "a.pt")
    read = read_torch_file(tmp_path / "a.pt")
    read["x"][:] = 1.0
    assert torch.equal(read_torch_file(tmp_path / "a.pt")["x"], torch.zeros(1000))


def test_tensordicts_are_read_without_tensordict(tmp_path, tensordict_names):
    entries = {"obs": torch.randn(2, 3, 4), "task": torch.zeros(2, 3, dtype=torch.int32)}
    nested = {"data": TensorDict(entries, torch.Size([2, 3])), "device": torch.device("cpu")}
    torch.save(nested, tmp_path / "new.pt")
    read = read_torch_file(tmp_path / "new.pt")
    assert_equal(read["data"], entries)
    assert read["device"] == "cpu"


def test_tensordicts_of_older_releases_are_read(tmp_path, tensordict_names, monkeypatch):
    entries = {"obs": torch.randn(2, 3, 4)}
    # They pickle as plain instances with a state.
    monkeypatch.setattr(TensorDict, "__reduce__", object.__reduce__)
    monkeypatch.setattr(TensorDict, "__getstate__", lambda self: {"_tensordict": OrderedDict(self.entries)})
    torch.save(TensorDict(entries, torch.Size([2, 3])), tmp_path / "old.pt")
    assert_equal(read_torch_file(tmp_path / "old.pt"), entries)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"obs": torch.zeros(2), "x": RunsCode(marker)}, tmp_path / "evil.pt")
    with pytest.raises(UnsafeFileError, match="posix.system.*nothing was imported or executed"):
        read_torch_file(tmp_path / "evil.pt")
    assert not marker.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # the file is a real one
    assert marker.exists()


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(RunsCode(marker)))
    with pytest.raises(UnsafeFileError, match="bare pickle"):
        read_torch_file(tmp_path / "evil.pt")
    assert not marker.exists()


def test_foreign_objects_are_read_only_where_the_caller_names_their_class(tmp_path):
    torch.save({"rms": Statistics()}, tmp_path / "a.pt")
    name = f"{Statistics.__module__}.Statistics"
    with pytest.raises(UnsafeFileError, match="Statistics"):
        read_torch_file(tmp_path / "a.pt")
    read = read_torch_file(tmp_path / "a.pt", objects=[name])["rms"]
    assert type(read) is ForeignObject and read.class_name == name
    assert torch.equal(read.state["mean"], torch.arange(3.0))


def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path):
    torch.save({"x": torch.zeros(2, 3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for entry in source.namelist():
            content = source.read(entry)
            if entry.endswith("data.pkl"):
                shape = b"K\x02K\x03\x86"  # (2, 3)
                assert shape in content
                content = content.replace(shape, b"K\x09K\x03\x86")
            target.writestr(entry, content)
    with pytest.raises(ValueError, match="in a storage of 6 values"):
        read_torch_file(tmp_path / "b.pt")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_torch_file(tmp_path / "a.pt")


def test_flipped_bytes_are_found_by_the_checksum(tmp_path):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[2500] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        read_torch_file(tmp_path / "a.pt")
    assert read_torch_file(tmp_path / "a.pt", verify=False)["x"].shape == (1000,)
