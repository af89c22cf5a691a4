"""Run Stable-Baselines3's own test-suite with PWM in the place of SAC.

    python tests/sb3_suite/run.py                         # all cases, writes the two reports
    python tests/sb3_suite/run.py --only test_set_env     # some cases with tracebacks, no report

The tests come from SB3's source distribution, which is kept in `.cache/` and never committed. The
exit status is 0 if at least 85 % of the cases that construct SAC pass and every other one has its
reason in allowed.toml.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import tarfile
import tempfile

from report import Verdict, read_allowances, read_cases

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DROP_IN = "pwm_gym:PWM"
FILES = (
    "test_save_load",
    "test_callbacks",
    "test_predict",
    "test_deterministic",
    "test_spaces",
    "test_run",
    "test_vec_normalize",
    "test_identity",
    "test_train_eval_mode",
    "test_custom_policy",
    "test_dict_env",
    "test_n_step_replay",
    "test_gae",
)


@dataclasses.dataclass(frozen=True)
class Release:
    """What is known of one release of SB3.

    Attributes:
        sha256: Digest of its source distribution on PyPI.
        cases: Number of cases in `FILES` that construct SAC, counted with SAC itself, without CUDA.
    """

    sha256: str
    cases: int


RELEASES = {
    "2.9.2": Release("8af267e9513343f481b3f0680b7740ad79a746873db24f18a9fb2edcbd9a2df7", cases=77),
}


def fetch_tests(version: str, cache: pathlib.Path) -> pathlib.Path:
    """Download SB3's source distribution and keep its tests, unless they are there already.

    The package itself is left out, so that the tests see the installed one.

    Args:
        version: A release in `RELEASES`.
        cache: Folder for the downloads; created if need be.

    Returns:
        Folder with `tests/` and SB3's pytest configuration.

    Raises:
        ValueError: If the archive is not the one that was published.
    """
    home = cache / f"sb3-{version}"
    if home.is_dir():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder]
        # pip builds metadata even then; without isolation it downloads no build tools for that
        command += ["--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        subprocess.run([*command, f"stable-baselines3=={version}"], check=True)
        (archive,) = pathlib.Path(folder).glob("*.tar.gz")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != RELEASES[version].sha256:
            raise ValueError(f"{archive.name} must have SHA-256 {RELEASES[version].sha256}, got {digest}.")
        top = f"stable_baselines3-{version}"
        wanted = (f"{top}/tests/", f"{top}/pyproject.toml", f"{top}/LICENSE")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.name.startswith(wanted)]
            tar.extractall(folder, members, filter="data")
        os.replace(pathlib.Path(folder, top), home)
    return home


def run_tests(home: pathlib.Path, cases: pathlib.Path, arguments: argparse.Namespace) -> None:
    """Run pytest in a process of its own.

    Args:
        home: What `fetch_tests` returned.
        cases: JSON file that the plugin writes.
        arguments: The command line.

    Raises:
        RuntimeError: If pytest could not run the tests at all.
    """
    python_path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider"]
    command += ["-c", "pyproject.toml", *(f"tests/{file}.py" for file in FILES)]
    command += ["--drop-in", arguments.drop_in, "--cases", str(cases)]
    command += ["--case-timeout", str(arguments.case_timeout), "-n", str(arguments.workers)]
    command += ["-k", arguments.only] if arguments.only else ["--tb=no"]
    # One thread per worker, or the workers would compete for the cores
    environment = os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, cwd=home, env=environment).returncode
    if status not in (0, 1):
        raise RuntimeError(f"pytest stopped with status {status}; its messages are above.")


def main() -> int:
    """Fetch, run, judge, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drop-in", default=DROP_IN, help="module:Class put in the place of SAC")
    parser.add_argument("--only", help="run the cases that fit this `pytest -k` expression")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0 for none but pytest's")
    parser.add_argument("--case-timeout", type=float, default=120.0, help="seconds per case")
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / "results/sb3_suite.json")
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs/sb3_suite.md")
    arguments = parser.parse_args()

    version = importlib.metadata.version("stable-baselines3")
    if version not in RELEASES:
        parser.error(f"Stable-Baselines3 must be one of {list(RELEASES)}, got {version}.")
    home = fetch_tests(version, ROOT / ".cache")
    with tempfile.TemporaryDirectory() as folder:
        run_tests(home, pathlib.Path(folder, "cases.json"), arguments)
        cases = read_cases(pathlib.Path(folder, "cases.json"))

    setting = {"class": arguments.drop_in, "Python": platform.python_version()}
    setting |= {name: importlib.metadata.version(name) for name in ("stable-baselines3", "gymnasium", "torch", "numpy")}
    verdict = Verdict(cases, read_allowances(HERE / "allowed.toml"), setting)
    print(verdict.summary())
    for case in verdict.unexplained:
        print(f"unexplained: {case.name}: {case.error} ({case.where})")
    if arguments.only:
        return 0 if verdict.holds else 1

    for row in verdict.unused:
        print(f"allowed.toml: nothing failed for {row.cases!r}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(verdict.to_json() + "\n")
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(verdict.to_markdown("make sb3-suite") + "\n")
    if len(verdict.counted) < RELEASES[version].cases:
        print(f"expected {RELEASES[version].cases} such cases, got {len(verdict.counted)}")
        return 1
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
