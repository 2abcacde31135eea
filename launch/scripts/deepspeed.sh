#!/bin/bash
# One training run by deepspeed over the nodes of a hostfile, lines such as `10.0.0.1 slots=8` (a slot is a process, one a
# GPU). Where node 0 reaches the others by ssh without a password (and has pdsh), start it there:
#
#     HOSTFILE=hostfile deepspeed.sh dataset=data/mine out=runs/mine
#
# Without ssh start it on every node, in the same folder, nodes numbered as in the hostfile:
#
#     HOSTFILE=hostfile NODE_RANK=0 MASTER_ADDR=10.0.0.1 deepspeed.sh dataset=data/mine out=runs/mine
#
# Edit: how a node finds python, the port (two runs on a node need two), the network interface.

set -eu
: "${HOSTFILE:?the path of the hostfile}"
[ -f "$HOSTFILE" ] || { echo "HOSTFILE=$HOSTFILE is no file" >&2; exit 2; } # deepspeed would start this node alone

venv="${VENV:-.venv}"
[ -f "$venv/bin/activate" ] || { echo "no virtual environment $venv here: make one, or give VENV=its folder" >&2; exit 2; }
source "$venv/bin/activate"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0   # where the default route is not the nodes' fast network

how=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
  how+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?address of node 0}")
fi
exec deepspeed "${how[@]}" --module sigmoe.launch.train "$@"
