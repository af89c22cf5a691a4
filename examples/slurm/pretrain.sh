#!/bin/bash
# One world model on all GPUs of this job's nodes:
#
#   sbatch examples/slurm/pretrain.sh DATASET OUT [more arguments of python -m pwm_gym pretrain]
#
# A process that dies is started again with all others, from the last checkpoint; so is the job, on any number of nodes.
#SBATCH --job-name=pwm-pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=2-00:00:00
#SBATCH --requeue
set -euo pipefail
dataset=$1 out=$2
shift 2

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=1
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" \
    -m pwm_gym pretrain "$dataset" --out "$out" --paper "$@"
