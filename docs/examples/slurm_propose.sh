#!/bin/bash
# Proposals for a list of images by 64 jobs that know nothing of each other:
#     sbatch docs/examples/slurm_propose.sh list.txt runs/photos
# A job that was killed is submitted again as it is: sbatch --array=17 ...
#SBATCH --job-name=maskpath
#SBATCH --array=1-64
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=24:00:00
#SBATCH --requeue

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun .venv/bin/python tools/propose.py --images "$1" --output "$2" --no-json \
    --shard "$SLURM_ARRAY_TASK_ID/64" --precision bf16
