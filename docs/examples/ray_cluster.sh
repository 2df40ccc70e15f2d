#!/bin/bash
# Proposals by Ray on all machines of a Slurm job; without Slurm, run the same `ray` commands by hand.
#     sbatch docs/examples/ray_cluster.sh list.txt runs/photos
#SBATCH --job-name=maskpath
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00

# Who reaches a Ray cluster's ports can run anything on it: this asks for a token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export PATH=$PWD/.venv/bin:$PATH
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --nodes 1 --ntasks 1 --nodelist "$head" --overlap \
    ray start --head --port 6379 --include-dashboard=false --disable-usage-stats --block &
sleep 20
srun --nodes $((SLURM_NNODES - 1)) --ntasks $((SLURM_NNODES - 1)) --exclude "$head" --overlap \
    ray start --address "$head:6379" --block &
sleep 20
srun --nodes 1 --ntasks 1 --nodelist "$head" --overlap \
    python tools/propose.py --images "$1" --output "$2" --no-json --engine ray --address auto
