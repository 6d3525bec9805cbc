#!/usr/bin/env bash
# The main job on real text, on 2 CPU cores: corpus, tokenizer, token files, four growing stages, a report.
# What is done is skipped, so a call that was stopped goes on.
#
#   PYTHON=python3                              the Python to use
#   DEMO_TOKENIZER=SentencePieceTokenizer       the other tokenizer (default: HFTokenizer)
#   DEMO_LAUNCHER=local                         what starts processes (default: deepspeed)
#
# Arguments go to the stage machine: examples/demo/run.sh common.training.steps=20
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
TOKENIZER=${DEMO_TOKENIZER:-HFTokenizer}
LAUNCHER=${DEMO_LAUNCHER:-deepspeed}
RUN=runs/demo
case $TOKENIZER in
  HFTokenizer) MODEL=$RUN/tokenizer.json ;;
  SentencePieceTokenizer) MODEL=$RUN/tokenizer.model ;;
  *) echo "error: DEMO_TOKENIZER=$TOKENIZER; use HFTokenizer or SentencePieceTokenizer" >&2; exit 2 ;;
esac

# Two processes need two GPUs, or none.
GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" -lt 2 ] && [ -z "${DS_ACCELERATOR:-}" ]; then
  [ "$GPUS" = 0 ] || echo "one GPU cannot serve the demo's two processes, so they use the CPU"
  export DS_ACCELERATOR=cpu
fi

say() { printf '\n== %s\n' "$*"; }

mkdir -p "$RUN"
if [ -f "$RUN/tokenizer" ] && [ "$(cat "$RUN/tokenizer")" != "$TOKENIZER" ]; then
  echo "error: $RUN was made with the $(cat "$RUN/tokenizer"); delete $RUN to make it with the $TOKENIZER" >&2
  exit 2
fi
echo "$TOKENIZER" > "$RUN/tokenizer"

say "1/4 corpus: the Python standard library, as .jsonl.zst"
"$PYTHON" examples/demo/make_corpus.py --output "$RUN/corpus"

if [ -f "$MODEL" ]; then
  say "2/4 tokenizer: done"
else
  say "2/4 tokenizer: 2,048 entries, learnt from the training files"
  "$PYTHON" tools/train_tokenizer.py --input "$RUN/corpus/train-*.jsonl.zst" \
    --type "$TOKENIZER" --vocab-size 2048 --output "$MODEL"
fi

mkdir -p "$RUN/data"
for split in train validation; do
  if [ -f "$RUN/data/${split}_text_document.idx" ]; then
    say "3/4 token files, $split: done"
  else
    say "3/4 token files, $split"
    "$PYTHON" tools/preprocess_data.py --input "$RUN/corpus/$split*.jsonl.zst" \
      --output-prefix "$RUN/data/$split" --tokenizer-type "$TOKENIZER" --tokenizer-model "$MODEL" \
      --append-eod --workers 2
  fi
done

say "4/4 four stages, each grown from the last"
"$PYTHON" -m megatron_tokenformer.progressive --config configs/progressive/demo.yaml --launcher "$LAUNCHER" "$@"
