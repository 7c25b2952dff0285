#!/usr/bin/env bash
# What srun starts once on every node: Ray, with the resource of the node's role; on the head node also the run itself.
#   node.sh ROLE HEAD NODES COMMAND...
# ROLE: student, teacher, or a number N: the first N nodes of the step are students, the others teachers.
# HEAD: address of the head node.  NODES: of the whole cluster.  COMMAND: is run on the head once all nodes are there.
set -euo pipefail
role=$1 head=$2 nodes=$3
shift 3
if [[ $role =~ ^[0-9]+$ ]]; then
    if ((SLURM_NODEID < role)); then role=student; else role=teacher; fi
fi
gpus=${SLURM_GPUS_ON_NODE:-0}
cpus=$SLURM_CPUS_ON_NODE
slots=$((gpus > 0 ? gpus : cpus)) # workers or shards that find a place here

# RAY_ADDRESS is for the command alone: it makes taid-ray join this cluster instead of starting one.
exec ray symmetric-run --address "$head:6379" --min-nodes "$nodes" \
    --num-cpus="$cpus" --num-gpus="$gpus" --resources="{\"taid_$role\": $slots}" --labels="taid/role=$role" \
    -- env RAY_ADDRESS="$head:6379" "$@"
