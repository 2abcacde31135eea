#!/bin/bash
# One training run as a Slurm job that goes on by itself until it is done:
#
#     sbatch slurm.sh dataset=data/mine out=runs/mine parallel.tp=2
#
# Edit: the lines that begin with #SBATCH, and how a node finds python. The folder that sbatch is called in, and all that
# the words name, must be the same on all nodes. `--ntasks-per-node` is one process a GPU.
#
#SBATCH --job-name=sigmoe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Five minutes before the time is up (--signal) the run saves and ends; then the job goes back into the queue.

venv="${VENV:-.venv}"
[ -f "$venv/bin/activate" ] || { echo "no virtual environment $venv here: make one, or give VENV=its folder" >&2; exit 2; }
source "$venv/bin/activate"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0   # where the default route is not the nodes' fast network

# A node that fails takes the others along at once, not when their patience ends.
srun --kill-on-bad-exit=1 python -m sigmoe.launch.train "$@" &
step=$!
time_is_up=
trap 'time_is_up=1; kill -USR1 "$step"' USR1
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the trap ended the wait, not the step
  wait "$step"
  code=$?
done
if [ -n "$time_is_up" ] && [ "$code" -eq 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
