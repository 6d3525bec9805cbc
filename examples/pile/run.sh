#!/usr/bin/env bash
# From downloaded shards of the Pile to 1.4B: tokenize, look at it, then four growing stages.
# What is done is skipped, so a call that was stopped goes on.
#
#   PILE=pile                       folder with train/*.jsonl.zst and val.jsonl.zst
#   TOKENIZER=20B_tokenizer.json    a tokenizer.json, here GPT-NeoX's
#   WORKERS=32                      cores for tokenizing
#   LAUNCHER=deepspeed              local, deepspeed; slurm submits the stages as a chain of jobs
#
# Arguments go to the stage machine: examples/pile/run.sh launch.nodes=4 launch.hostfile=hosts
set -euo pipefail
cd "$(dirname "$0")/../.."

PILE=${PILE:-pile}
TOKENIZER=${TOKENIZER:-20B_tokenizer.json}
SCHEDULE=${SCHEDULE:-configs/progressive/pile-124m-to-1.4b.yaml}
say() { printf '\n== %s\n' "$*"; }

tokenize() { # input, output prefix
  if [ -f "${2}_text_document.idx" ]; then say "$2: done" && return; fi
  say "$2"
  python tools/preprocess_data.py --input "$1" --output-prefix "$2" --append-eod \
    --tokenizer-type HFTokenizer --tokenizer-model "$TOKENIZER" --workers "${WORKERS:-32}"
}

# On a cluster, examples/slurm/preprocess.sbatch does the first of these on many nodes.
mkdir -p data
tokenize "$PILE/train/*.jsonl.zst" data/pile
tokenize "$PILE/val.jsonl.zst" data/pile-validation

say "what was made, and whether it is whole"
for prefix in data/pile_text_document data/pile-validation_text_document; do
  python tools/inspect_dataset.py "$prefix" --documents 1
done

say "124M, 354M, 757M, 1.4B"
python -m megatron_tokenformer.progressive --config "$SCHEDULE" --launcher "${LAUNCHER:-deepspeed}" "$@"
