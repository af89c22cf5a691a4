"""The slurm scripts, dry-run: bash reads them, and stand-ins for slurm's commands note what would be run where."""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest

from pwm_gym import cli

SCRIPTS = pathlib.Path(__file__).parents[1] / "examples/slurm"
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "32"}


def dry_run(folder: pathlib.Path, script: str, *arguments: str, **job: str) -> list[list[str]]:
    """Run a script with stand-ins: `srun` notes its words, after what it needs has been started."""
    calls = folder / "calls"
    stands_in = {
        "scontrol": "printf 'n1\\nn2\\nn3\\n'",
        "srun": f"""
            noted() {{ until grep -qs -e "$1" {calls}; do :; done; }}  # by a call in the background
            case "$*" in
                *"ray status"*) noted --head ;;
                *" extract "*) noted --exclude ;;
            esac
            line=$(printf '%s\\t' "$@")
            echo "$line" >> {calls}  # in one write""",
        "sleep": "true",
    }
    for name, content in stands_in.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{content}\n")
        path.chmod(0o755)
    env = os.environ | JOB | job | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", str(SCRIPTS / script), *arguments], env=env, check=True, timeout=60)
    return [line.rstrip("\t").split("\t") for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.iterdir()))
def test_bash_reads_the_script(script):
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)


def test_extraction_starts_a_head_then_the_other_nodes_then_the_run(tmp_path):
    calls = dry_run(tmp_path, "extract.sh", "model.pt", "data", "out", "--released", SLURM_GPUS_ON_NODE="8")
    (head,) = [call for call in calls if "--head" in call]
    assert "--nodelist=n1" in head and head[head.index("--port") + 1] == "20007"
    (others,) = [call for call in calls if "--exclude=n1" in call]
    assert "--nodes=2" in others and others[others.index("--address") + 1] == "n1:20007"
    assert all(call[call.index("--num-gpus") + 1] == "8" for call in (head, others))
    run = next(call for call in calls if "python" in call)
    assert run[:4] == ["--overlap", "--nodes=1", "--ntasks=1", "--nodelist=n1"]
    assert run[run.index("--ray") + 1] == "n1:20007" and run[run.index("--ray-gpus") + 1] == "0.25"


@pytest.mark.parametrize("script, command", [("extract.sh", "extract"), ("pretrain.sh", "pretrain")])
def test_what_a_script_runs_is_a_command_of_ours(tmp_path, script, command, monkeypatch):
    arguments = ("model.pt", "data", "out") if command == "extract" else ("data", "out")
    calls = dry_run(tmp_path, script, *arguments)
    words = next(call for call in calls if "pwm_gym" in call)
    given = words[words.index("pwm_gym") + 1 :]
    assert given[0] == command
    with pytest.raises(SystemExit) as ended:  # the files aren't there, but the arguments are read
        cli.main(given)
    assert ended.value.code == 1


def test_pretraining_meets_at_the_first_node(tmp_path):
    (call,) = dry_run(tmp_path, "pretrain.sh", "data", "out", "--size", "48M", SLURM_GPUS_ON_NODE="4")
    assert call[:5] == ["torchrun", "--nnodes", "3", "--nproc-per-node", "4"]
    assert call[call.index("--rdzv-endpoint") + 1] == "n1:20007"
    assert call[-2:] == ["--size", "48M"]
