#!/usr/bin/env bash
# One run on several Slurm nodes: Ray starts on all of them, the command runs on the first, Ray stops.
#
#   sbatch --nodes=2 launch/slurm.sh train experiment=dialogue_llama3_8b cluster=gpu_cluster \
#     run.root=/shared/runs task.train_file=/shared/train.jsonl task.eval_file=/shared/eval.jsonl
#
# run.root, data and models must lie on a file system that every node sees.
#SBATCH --job-name=r2m-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --signal=B:TERM@300

set -euo pipefail

PORT=${RAY_PORT:-6379}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Every node proves itself with the token of this home directory, which Slurm nodes share.
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null

# The batch shell gets Slurm's warning; passing it on gives the run time to stop in order.
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
  ray symmetric-run --address "$HEAD:$PORT" --min-nodes "$SLURM_NNODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-8}" \
  -- r2m-ray "$@" cluster.address=auto &
RUN=$!
trap 'kill -TERM "$RUN"' TERM
wait "$RUN"
