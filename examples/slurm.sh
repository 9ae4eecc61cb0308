#!/bin/bash
# A run on two nodes of four GPUs: sbatch examples/slurm.sh; again after the time limit, it goes on.
#SBATCH --job-name=twins
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120

RUN=runs/cub200
START="--recipe cub200 --data-root data --checkpoint resnet50_linf_eps4.0.ckpt --amp bf16 --batch-size 256 --run $RUN"
if [ -e "$RUN/last.safetensors" ]; then START="--resume $RUN"; fi

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" \
    -m -- twins_fast train $START
