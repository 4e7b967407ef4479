#!/bin/bash
# Several machines under Slurm:   sbatch accelerate_configs/slurm.sh --model DIR --data PATH --output /shared/runs/name
# Change: nodes, GPUs per node, time. The output must lie on storage that all nodes share.
#SBATCH --job-name=photon
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Slurm starts a job again that it had to stop, and with --resume below the run then goes on by itself.
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
export MAIN_IP PORT GPUS
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_IP=${HOSTS%%$'\n'*}
PORT=$((20000 + SLURM_JOB_ID % 10000))
GPUS=${SLURM_GPUS_PER_NODE:-8}
GPUS=${GPUS##*:} # a type may stand before the number (h100:8)

# One launcher per node; each starts a process per GPU. If one of them dies, all are stopped.
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_IP" --main_process_port "$PORT" \
    recipes/convert_llama.py --resume "$@"' launcher "$@"
