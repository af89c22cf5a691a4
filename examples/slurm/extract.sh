#!/bin/bash
# A policy for each task of a world model, from ten seeds, on a Ray cluster of this job's nodes:
#
#   sbatch examples/slurm/extract.sh MODEL DATASET OUT [more arguments of python -m pwm_gym extract]
#
# MODEL, DATASET and OUT are on a file system that all nodes see. Given in again after its time limit, it goes on.
#SBATCH --job-name=pwm-extract
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail
model=$1 dataset=$2 out=$3
shift 3

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$head:$((20000 + SLURM_JOB_ID % 10000))
gpus=${SLURM_GPUS_ON_NODE:-0}
node=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$gpus" --block)
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT  # the nodes, when the run is over

srun --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --port "${address#*:}" --include-dashboard=false "${node[@]}" &
for ((tries = 0; ; tries++)); do
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" ray status --address "$address" >/dev/null 2>&1 && break
    if ((tries == 60)); then
        echo "no Ray head node at $address" >&2
        exit 1
    fi
    sleep 2
done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
    srun --nodes="$others" --ntasks="$others" --exclude="$head" ray start --address "$address" "${node[@]}" &
fi

share=0
if ((gpus > 0)); then share=0.25; fi  # four policies share a GPU
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    python -m pwm_gym extract "$model" "$dataset" --out "$out" --seed 0 1 2 3 4 5 6 7 8 9 \
    --ray "$address" --ray-gpus "$share" "$@"
