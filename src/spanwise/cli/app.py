"""The commands and their help. Importing this imports neither torch nor transformers."""

from __future__ import annotations

from importlib.metadata import version

from cyclopts import App

_HELP = "Spread model inference over the devices you have."
_EXAMPLES = """\
Examples:
  spanwise run spanwise/tiny-dense "def main("
  spanwise run MODEL_FOLDER "Say hello." --chat -tp 2 --devices cpu:2
  spanwise run MODEL_FOLDER --input prompts.jsonl --output out.jsonl
  spanwise devices

spanwise COMMAND --help says more. SPANWISE_DEBUG=1 shows an error's traceback.
"""
_RUN_EXAMPLES = """\
Examples:
  spanwise run spanwise/tiny-dense "def main(" --max-tokens 64
  spanwise run spanwise/tiny-moe "class Node:" -tp 2 --enable-expert-parallel
  spanwise run MODEL_FOLDER "Say hello." --chat -pp 2 --devices cuda:0,1
  printf 'import os' | spanwise run spanwise/tiny-dense - --seed 7 --n 3
  spanwise run MODEL_FOLDER --input prompts.jsonl --output out.jsonl -dp 2

A line of prompts.jsonl is one of these; sampling fields may stand beside it:
  {"prompt": "def main(", "max_tokens": 64, "temperature": 0}
  {"prompt_token_ids": [5, 6, 7]}
  {"messages": [{"role": "user", "content": "Say hello."}]}
"""
_DEVICES_EXAMPLES = """\
Examples:
  spanwise devices
  spanwise devices --json
"""


def _version() -> str:
    return f"spanwise {version('spanwise')}"


app = App(
    name="spanwise",
    help=_HELP,
    help_epilogue=_EXAMPLES,
    help_format="plaintext",
    version=_version,
    version_format="plaintext",
    # Errors, signals and exit codes are main's.
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
app.command(
    "spanwise.cli.run:run",
    name="run",
    help="Generate text for a prompt, or for every line of a file.",
    help_epilogue=_RUN_EXAMPLES,
)
app.command(
    "spanwise.cli.devices:devices",
    name="devices",
    help="Show the devices of this machine: accelerators, cores, memory.",
    help_epilogue=_DEVICES_EXAMPLES,
)
