"""A sweep as a Slurm array: one task for every run, which resumes when it is put back into the queue."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from align.data.files import write_text
from align.sweeps.folder import LOGS
from align.sweeps.members import Member
from align.sweeps.running import Launcher
from alignflow.errors import RunFolderError

WRITTEN = "# Written by alignflow sweep"

SCRIPT = """\
#!/bin/bash
{written}: {number} runs, one task each. Set partition, account and time for your cluster, then: sbatch {file}
# When all tasks have ended: alignflow compare {folder}
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH {resources}
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}/slurm-%A_%a.log

cd {here} || exit 1
case "$SLURM_ARRAY_TASK_ID" in
{cases}
*) echo "the sweep has no task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
grep -qs '"status": "finished"' "$run/summary.json" "$run/results.json" && exit 0
[ -d "$run" ] && command+=(--resume)
srun "${{command[@]}}"
code=$?
# 130: Slurm asked the run to stop, and it left a checkpoint
[ "$code" -eq 130 ] && scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
exit "$code"
"""


def script(folder: Path, members: Sequence[Member], launcher: Launcher, file: Path) -> str:
    """The text of the script; the tasks run in the present working folder."""
    cases = [
        f"{number}) run={shlex.quote(str(folder / member.name))}\n"
        f"   command=({shlex.join(launcher.shown(member.words(folder)))}) ;;"
        for number, member in enumerate(members)
    ]
    cpu = all(member.settings.get("generator.device") == "cpu" for member in members)
    return SCRIPT.format(
        written=WRITTEN, number=len(members), file=shlex.quote(str(file)), folder=shlex.quote(str(folder)),
        name=folder.name, last=len(members) - 1, logs=folder.absolute() / LOGS, here=shlex.quote(str(Path.cwd())),
        resources=f"--cpus-per-task={launcher.processes}" if cpu else f"--gpus-per-node={launcher.processes}",
        cases="\n".join(cases),
    )  # fmt: skip


def write_script(path: Path, text: str) -> None:
    """Write the script; raises RunFolderError if the file is there and is not one that a sweep wrote."""
    if path.is_dir() or (path.exists() and WRITTEN not in path.read_text(encoding="utf-8", errors="replace")[:200]):
        raise RunFolderError(f"{path} exists and was not written by alignflow sweep; give --slurm another name")
    write_text(path, text)
