#!/bin/bash
# One training run over several nodes by torchrun. Start it on every node, in the same folder:
#
#     NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 torchrun.sh dataset=data/mine out=runs/mine     # on 10.0.0.1
#     NODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 torchrun.sh dataset=data/mine out=runs/mine     # on the other
#
# RESTARTS=3 starts all ranks again, up to three times, when one has died; the run goes on from its newest checkpoint.
#
# Edit: how a node finds python, processes a node (one a GPU), the port, the network interface.

set -eu
: "${NODES:?how many nodes}" "${NODE_RANK:?number of this node, from 0}" "${MASTER_ADDR:?address of node 0}"

venv="${VENV:-.venv}"
[ -f "$venv/bin/activate" ] || { echo "no virtual environment $venv here: make one, or give VENV=its folder" >&2; exit 2; }
source "$venv/bin/activate"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0   # where the default route is not the nodes' fast network

# timeout: seconds for the other nodes to come (torchrun's own are 900).
exec torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "${PROCESSES:-8}" \
  --max-restarts "${RESTARTS:-0}" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
  --rdzv-conf timeout=120 \
  -m sigmoe.launch.train "$@"
