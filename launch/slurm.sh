#!/usr/bin/env bash
# One run on several Slurm nodes: Ray starts on all of them, the command runs on the first, Ray stops.
#
#   sbatch --nodes=2 launch/slurm.sh train experiment=dialogue_llama3_8b cluster=gpu_cluster \
#     run.root=/shared/runs task.train_file=/shared/train.jsonl task.eval_file=/shared/eval.jsonl
#
# run.root, data and models must lie on a file system that every node sees. The job's exit code is the run's:
# 75 means that it was stopped and has saved; submit it again with run.resume=true. Options of sbatch before the
# script win over the lines below: on smaller nodes, for example, --gpus-per-node=4 --cpus-per-task=16.
#SBATCH --job-name=r2m-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --signal=B:TERM@300

set -euo pipefail
umask 077

for COMMAND in python ray r2m-ray; do
  if ! command -v "$COMMAND" > /dev/null; then
    echo "error: $COMMAND is not found; activate the run's environment before sbatch" >&2
    exit 2
  fi
done

PORT=${RAY_PORT:-6379}
STATE=$(mktemp -d)
STOPS=0
RUN=

# The head's address, as the last node sees it: a host's own name may resolve to its loopback interface.
LAST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
HEAD=$(python -c '
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], 9))
    print(probe.getsockname()[0])' "$LAST")

# Slurm warns this shell alone. The run gets the signal; Ray must not, or it would be gone before the run saved.
trap 'STOPS=$((STOPS + 1)); [ -z "$RUN" ] || kill -TERM "$RUN" 2> /dev/null || true' TERM

# Every node proves itself with the token of this home directory, which Slurm nodes share.
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null

# Imports from a shared disk can take minutes.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}

# Once Ray is up on all nodes, a file appears on the first one, where this shell runs as well.
srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
  ray symmetric-run --address "$HEAD:$PORT" --min-nodes "$SLURM_NNODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" \
  -- sh -c 'touch "$1"; exec sleep infinity' ray-is-up "$STATE/up" &
NODES=$!
until [ -e "$STATE/up" ]; do
  if [ "$STOPS" -gt 0 ]; then
    kill "$NODES"
    exit 75
  fi
  if ! kill -0 "$NODES" 2> /dev/null; then
    echo "error: Ray did not start on all nodes; its messages are above" >&2
    exit 3
  fi
  sleep 1
done

r2m-ray "$@" cluster.address=auto &
RUN=$!
while true; do
  SEEN=$STOPS
  CODE=0
  wait "$RUN" || CODE=$?
  # A signal ends `wait`, not the run; asked again, it goes on waiting or reports the code of a run that has ended.
  [ "$SEEN" != "$STOPS" ] || break
done

# Ended by itself, the head would leave the other nodes waiting for it for a minute.
rm -r "$STATE"
kill "$NODES" 2> /dev/null || true
wait "$NODES" || true
exit "$CODE"
