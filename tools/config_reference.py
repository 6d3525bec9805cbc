"""The command of megatron_tokenformer/commands/config_reference.py, from a checkout."""

from megatron_tokenformer.commands.config_reference import main
from megatron_tokenformer.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
