"""The command of megatron_tokenformer/commands/train_tokenizer.py, from a checkout."""

from megatron_tokenformer.commands.train_tokenizer import main
from megatron_tokenformer.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
