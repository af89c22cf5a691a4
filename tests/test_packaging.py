"""What an installed pwm_gym holds, what it needs, and which way its imports point."""

import ast
import configparser
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A module imports from lower floors and from its own. Agents never import envs.
FLOORS = {
    "functional": 0,
    "kernels": 0,
    "bf16": 0,
    "networks": 0,
    "normalization": 0,
    "serialization": 0,
    "foreign": 0,
    "progress": 0,
    "versions": 0,
    "task_sets": 0,
    "world_model": 1,
    "replay": 1,
    "her": 1,
    "differentiable": 1,
    "starts": 1,
    "rendering": 2,
    "latent_env": 2,
    "datasets": 2,
    "checkpoints": 2,
    "training": 2,
    "planning": 2,
    "sb3": 3,
    "evaluation": 3,
    "envs": 4,
    "agents": 5,
    "extraction": 6,
    "collection": 6,
    "cluster": 6,
    "benchmark": 6,
    "zoo": 6,
    "cli": 6,
    "__main__": 6,
}


# The wheel and the links


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that no build folder is left behind or reused."""
    tmp = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
    shutil.copytree(ROOT, tmp / "source", symlinks=True, ignore=ignore)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp / "dist"), str(tmp / "source")],
        check=True,
        capture_output=True,
        env=os.environ | {"PIP_NO_INDEX": "1"},
    )
    (path,) = (tmp / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pwm_gym"}


def test_wheel_holds_every_module_the_type_marker_and_published_scores(wheel):
    modules = {path.relative_to(ROOT).as_posix() for path in _modules()}
    others = {"pwm_gym/py.typed", "pwm_gym/extraction/published_scores.csv"}
    assert modules | others <= set(wheel.namelist())


def test_wheel_names_its_license(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: MIT" in wheel.read(metadata).decode()
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.parametrize("name", ["agents", "envs"])
def test_link_at_the_root_points_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"pwm_gym/{name}"
    assert link.is_dir()


# Imports


def _modules():
    return sorted((ROOT / "pwm_gym").rglob("*.py"))


def _dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(path):
    """Yield (line, dotted parts) of each import, wherever in the file it stands."""
    package = _dotted(path) if path.name == "__init__.py" else _dotted(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from pwm_gym import sb3` names a module, `from pwm_gym.sb3 import x` need not.
            for alias in node.names:
                yield node.lineno, base + (alias.name,) if base == ("pwm_gym",) else base


def test_every_module_stands_on_a_floor():
    names = {_dotted(path)[1] for path in _modules() if len(_dotted(path)) > 1}
    assert names <= FLOORS.keys(), f"give a floor in {__name__} to {sorted(names - FLOORS.keys())}"


def test_imports_point_down():
    wrong = []
    for path in _modules():
        module = _dotted(path)
        if len(module) == 1:
            continue  # pwm_gym/__init__.py gathers the public names of all floors
        floor = FLOORS.get(module[1], 0)
        for line, target in _imports(path):
            if target[0] != "pwm_gym":
                continue
            name = target[1] if len(target) > 1 else None
            points_down = name == "__version__" or FLOORS.get(name, 99) <= floor
            if not points_down or (module[1] == "agents" and name == "envs"):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {'.'.join(target)}")
    assert not wrong, "imports must point to the same floor or a lower one:\n" + "\n".join(wrong)


def test_imports_are_declared():
    known = set(sys.stdlib_module_names) | {"pwm_gym"}
    providers = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for _, requirement in _requirements()}
    unknown = set()
    for path in _modules():
        for line, target in _imports(path):
            names = {canonicalize_name(name) for name in providers.get(target[0], [target[0]])}
            if target[0] not in known and not names & declared:
                unknown.add(f"{path.relative_to(ROOT)}:{line} imports {target[0]}")
    assert not unknown, "setup.cfg does not declare:\n" + "\n".join(sorted(unknown))


# Versions


def _setup_cfg():
    config = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    config.optionxform = str
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def _requirements():
    """Yield (extra, requirement), with extra None for what is always installed."""
    config = _setup_cfg()
    groups = {None: config["options"]["install_requires"]} | dict(config["options.extras_require"])
    for extra, lines in groups.items():
        for line in lines.split("\n"):
            if line.strip() and Requirement(line).name != "pwm-gym":
                yield extra, Requirement(line)


def _pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("extra, requirement", list(_requirements()), ids=str)
def test_bounds_hold_the_tested_version(extra, requirement):
    assert _pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_simulators_and_core_libraries_have_an_upper_bound():
    for extra, requirement in _requirements():
        if extra == "dev" or requirement.name in {"rich", "tqdm", "packaging"}:
            continue
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators & {"<", "=="}, f"{requirement} needs an upper bound"


def test_pins_are_exact_and_fit_every_build():
    for name, version in _pins().items():
        assert str(Version(version)), name
        assert "+" not in version, f"{name}=={version} names one build; leave the suffix out"


def test_extra_all_holds_every_extra_but_dev():
    extras = _setup_cfg()["options.extras_require"]
    (everything,) = [Requirement(line) for line in extras["all"].split("\n") if line.strip()]
    assert everything.extras == set(extras) - {"all", "dev"}
