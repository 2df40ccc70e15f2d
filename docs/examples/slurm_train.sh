#!/bin/bash
# Trains all stages on two machines with eight GPUs each: sbatch docs/examples/slurm_train.sh
#SBATCH --job-name=maskpath
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue

# sbatch from the checkout, which all machines see. A run that is queued again goes on where it was.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    tools/run_pipeline.py --config configs/coco_8gpu.yaml --output runs/coco
