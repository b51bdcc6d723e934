# What is particular to a cluster. Keep one such file a cluster, and name it by LDM_PROFILE; without, this one is taken.
# Source it in the shell that calls sbatch, which reads SBATCH_*; the jobs source it again for all the rest.

# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project
# export SBATCH_GRES=gpu:8  # a node's; then: sbatch --nodes=4 --ntasks-per-node=8 slurm/train.sbatch ...
# export SBATCH_TIMELIMIT=24:00:00

# module load cuda/12.8
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5  # ranks agree on stops and saves over gloo
# export WANDB_MODE=offline  # where compute nodes have no network; later: wandb sync runs/*/wandb/offline-run-*

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
SRUN=(srun)  # with a container: SRUN=(srun --container-image="$PWD/ldm.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
