# shellcheck shell=bash disable=SC2034
# Read by the batch scripts, which run on the first node: that node is the head.
set -euo pipefail
if [[ $# -eq 0 ]]; then
    echo "error: no command after the script's name; give one, for example: taid-ray train CONFIG.yaml --out RUN" >&2
    exit 2
fi

# Run directories, the encoded data beside them, and a data.store elsewhere must be on disks that all nodes see.
# EDIT: where taid-ray is installed, visible to all nodes (`make install` makes .venv).
export PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"
export HF_HOME="${HF_HOME:-$SLURM_SUBMIT_DIR/huggingface}"
export RAY_USAGE_STATS_ENABLED=0

# The network is shared with other users: only who knows the token, in ~/.ray/auth_token, may talk to this Ray.
export RAY_AUTH_MODE=token
ray get-auth-token --generate >/dev/null
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 # seconds for all nodes to come; Ray's own 30 are too few on a shared disk

head=$(hostname -I | cut -d ' ' -f 1) # EDIT if the other nodes reach this one by another of its addresses
node_sh=$SLURM_SUBMIT_DIR/cluster/slurm/node.sh
each_node=(srun --ntasks-per-node=1 --cpu-bind=none --label) # one process a node, with all of its cores
