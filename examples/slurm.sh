#!/bin/bash
# One run on two nodes of eight GPUs:   sbatch examples/slurm.sh CONFIG key=value …
# Submitted again, it goes on from the last checkpoint: set train.save_every, and output_dir to a folder that all nodes see.
#SBATCH --job-name=drift
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
  set -- papers/a-qwen2.5-7b train.shard=fsdp output_dir=runs
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun a node, which starts a process for each of its GPUs.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-endpoint "$first:${DRIFT_PORT:-29500}" \
  -m drift run "$@"
