#!/usr/bin/env bash
# Train one model on this host.  From anywhere:
#
#   examples/deepspeed/one_node.sh configs/tokenformer-124m.yaml [section.key=value ...]
#
# GPUS=8 is how many processes are started; without a GPU they use the CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec deepspeed --num_gpus "${GPUS:-8}" --module megatron_tokenformer.training.pretrain --config "$@"
