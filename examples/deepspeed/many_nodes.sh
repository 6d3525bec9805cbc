#!/usr/bin/env bash
# Train one model on the hosts of a file, by pdsh over ssh.  From one of them (or a host that reaches them):
#
#   HOSTFILE=hosts examples/deepspeed/many_nodes.sh configs/tokenformer-124m.yaml [section.key=value ...]
#
# All hosts need this folder, the Python environment and the data under the same paths, and pdsh here.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Of this shell's variables pdsh passes on only PYTHON* and NCCL*; the others that ranks need stand in a file.
DS_ENV_FILE=$(mktemp)
trap 'rm -f "$DS_ENV_FILE"' EXIT
export DS_ENV_FILE
# Site: add what your hosts need, such as GLOO_SOCKET_IFNAME, HTTP proxies, or a cache on a local disk.
for name in OMP_NUM_THREADS DS_ACCELERATOR GLOO_SOCKET_IFNAME WANDB_API_KEY WANDB_MODE; do
  if [ -n "${!name:-}" ]; then echo "$name=${!name}" >> "$DS_ENV_FILE"; fi
done

# A host whose cable is cut says nothing: without this, ssh would wait for it for ever.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:--o ServerAliveInterval=5 -o ServerAliveCountMax=6}"

# deepspeed ends with 0 though a host's launcher was killed: the run's own record says whether it is finished.
deepspeed --hostfile "${HOSTFILE:-examples/deepspeed/hostfile}" --master_port "${MASTER_PORT:-29500}" \
  --module megatron_tokenformer.training.pretrain --config "$@"
