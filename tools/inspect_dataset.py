"""The command of megatron_tokenformer/commands/inspect_dataset.py, from a checkout."""

from megatron_tokenformer.commands.inspect_dataset import main
from megatron_tokenformer.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
