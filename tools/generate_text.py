"""The command of megatron_tokenformer/commands/generate_text.py, from a checkout."""

from megatron_tokenformer.commands.generate_text import main
from megatron_tokenformer.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
