"""The files in examples/slurm, run with programs in place of Slurm that only record how they are called."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny import ROOT

from ddgan import finetune_model
from ddgan.core.launch import LaunchArguments

FOLDER = ROOT / "examples" / "slurm"
PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "ddgan": 'printf "%q " "$@" > called; exit "$EXIT_CODE"',
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" > requeued; fi',
}
JOB = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}


@pytest.fixture
def submit(tmp_path):
    """Return a function that runs a batch file, and returns the arguments of ddgan and whether the job is requeued."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(file: Path, exit_code: int, *flags) -> tuple[list[str], bool]:
        (tmp_path / "requeued").unlink(missing_ok=True)
        environment = {**os.environ, **JOB, "SLURM_GPUS_ON_NODE": "8", "EXIT_CODE": str(exit_code)}
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
        result = subprocess.run(["bash", file, *flags], env=environment, cwd=tmp_path)
        assert result.returncode == exit_code
        return shlex.split((tmp_path / "called").read_text()), (tmp_path / "requeued").exists()

    return run


@pytest.mark.parametrize("name", ["one_node", "several_nodes"])
def test_a_job_starts_a_process_for_each_gpu_and_is_requeued_only_after_a_signal(submit, tmp_path, name):
    (tmp_path / "my photos").mkdir()
    flags = ("--train_data_dir", tmp_path / "my photos", "--output_dir", "faces")
    (command, *arguments), requeued = submit(FOLDER / f"{name}.sbatch", 143, *flags)
    run, _, data, *_, processes = finetune_model.parse(arguments, LaunchArguments)
    assert command == "finetune" and requeued
    assert (data.train_data_dir, run.resume_from_checkpoint) == (str(tmp_path / "my photos"), "latest")
    if name == "one_node":
        assert (processes.num_processes, processes.num_machines) == (8, None)
    else:
        assert (processes.num_processes, processes.num_machines, processes.machine_rank) == (16, 2, 1)
        assert (processes.main_process_ip, processes.main_process_port) == ("node1", 22345)
    for exit_code in (0, 1):
        assert not submit(FOLDER / f"{name}.sbatch", exit_code, *flags)[1]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", *FOLDER.iterdir()], check=True)
