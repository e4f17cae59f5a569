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
  spanwise serve MODEL_FOLDER
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
_BATCH_EXAMPLES = """\
Examples:
  spanwise batch spanwise/tiny-dense --input requests.jsonl --output out.jsonl
  spanwise batch MODEL_FOLDER --input prompts.csv --column text --output o.jsonl
  spanwise batch spanwise/digits-image --input images/ --output labels.jsonl
  spanwise batch SPEECH_FOLDER --input clips/ --output words.jsonl
  spanwise batch mine:model --input rows.parquet --column x --column y \\
    --output y.jsonl -dp 4

Started again after any end, kill -9 included, it goes on where it was.
A line of requests.jsonl is a request of OpenAI's batch format:
  {"custom_id": "1", "method": "POST", "url": "/v1/completions",
   "body": {"prompt": "def main(", "max_tokens": 64, "temperature": 0}}
"""
_SERVE_EXAMPLES = """\
Examples:
  spanwise serve spanwise/tiny-dense
  spanwise serve MODEL_FOLDER -tp 2 --devices cuda:0,1 --port 9000
  SPANWISE_API_KEY=secret spanwise serve MODEL_FOLDER \\
    --host 0.0.0.0 --ssl-certfile server.pem

  curl http://127.0.0.1:8000/v1/completions \\
    -H 'Content-Type: application/json' \\
    -d '{"model": "spanwise/tiny-dense", "prompt": "def ", "max_tokens": 32}'
"""
_DEVICES_EXAMPLES = """\
Examples:
  spanwise devices
  spanwise devices --json
"""
_CHAT_EXAMPLES = """\
Examples:
  spanwise chat MODEL_FOLDER --system "Answer in one sentence."
  spanwise chat http://localhost:8000 --temperature 0.7
  printf 'Hello\\nAnd now?\\n' | spanwise chat MODEL_FOLDER --quiet
"""
_BENCH_EXAMPLES = """\
Examples:
  spanwise bench serve --base-url http://localhost:8000 --concurrency 64
  spanwise bench latency spanwise/tiny-dense --batch-size 4
  spanwise bench scaling MODEL_FOLDER --devices 1,2
  spanwise bench attention

All but serve also write bench-results/NAME.json, and NAME.png with matplotlib:
  pip install "spanwise[bench]"
"""
_BENCH_SERVE_EXAMPLES = """\
Examples:
  spanwise bench serve --base-url http://localhost:8000 --concurrency 64
  spanwise bench serve --base-url http://localhost:8000 --request-rate 8 \\
    --num-requests 500 --input-len 32:512 --output-len 16@3,256@1 --seed 1
  spanwise bench serve --base-url http://localhost:8000 --endpoint chat \\
    --prompts prompts.jsonl --goodput ttft:500,tpot:50 --json results.json

A line of prompts.jsonl is one of these; fields of the request may stand beside:
  {"prompt": "def main(", "max_tokens": 64}
  {"prompt_token_ids": [5, 6, 7]}
  {"messages": [{"role": "user", "content": "Say hello."}]}
"""
_BENCH_LATENCY_EXAMPLES = """\
Examples:
  spanwise bench latency spanwise/tiny-dense
  spanwise bench latency MODEL_FOLDER --batch-size 8 --input-len 512 -tp 2
"""
_BENCH_THROUGHPUT_EXAMPLES = """\
Examples:
  spanwise bench throughput spanwise/tiny-dense --num-prompts 32
  spanwise bench throughput MODEL_FOLDER --input-len 32:512 \\
    --output-len 16@3,256@1 -pp 2 --devices cpu:2
"""
_BENCH_STARTUP_EXAMPLES = """\
Examples:
  spanwise bench startup spanwise/tiny-dense
  spanwise bench startup MODEL_FOLDER --cold -tp 2 --devices cuda:0,1
"""
_BENCH_SCALING_EXAMPLES = """\
Examples:
  spanwise bench scaling spanwise/tiny-dense --devices 1,2
  spanwise bench scaling MODEL_FOLDER --devices 1,2,4 --device cuda \\
    --layouts tp,pp --workloads 1024/16,128/128 --num-prompts 64 --runs 5
"""
_BENCH_ATTENTION_EXAMPLES = """\
Examples:
  spanwise bench attention
  spanwise bench attention --lengths 1024,2048 --heads 16 --dtype bfloat16
"""
_BENCH_BATCH_EXAMPLES = """\
Examples:
  spanwise bench batch spanwise/tiny-dense
  spanwise bench batch MODEL_FOLDER --batch-sizes 1,2,4,8,16,32,64 -tp 2
"""
_BENCH_METHODS_EXAMPLES = """\
Examples:
  spanwise bench methods spanwise/tiny-moe
  spanwise bench methods MODEL_FOLDER --devices 4 --device cuda
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
    "spanwise.cli.batch:batch",
    name="batch",
    help="Run every line, file or row of an input through a model; goes on after any end.",
    help_epilogue=_BATCH_EXAMPLES,
)
app.command(
    "spanwise.cli.serve:serve",
    name="serve",
    help="Serve a model over OpenAI's HTTP protocol.",
    help_epilogue=_SERVE_EXAMPLES,
)
app.command(
    "spanwise.cli.devices:devices",
    name="devices",
    help="Show the devices of this machine: accelerators, cores, memory.",
    help_epilogue=_DEVICES_EXAMPLES,
)
app.command(
    "spanwise.cli.chat:chat",
    name="chat",
    help="Talk with a model: one on a server, or one started here.",
    help_epilogue=_CHAT_EXAMPLES,
)
bench = App(
    name="bench",
    help="Measure servers, engines, layouts and attention.",
    help_epilogue=_BENCH_EXAMPLES,
)
app.command(bench)
bench.command(
    "spanwise.cli.bench:serve",
    name="serve",
    help="Measure any server that speaks OpenAI's protocol, from outside.",
    help_epilogue=_BENCH_SERVE_EXAMPLES,
)
bench.command(
    "spanwise.cli.bench_engine:latency",
    name="latency",
    help="Measure how long one batch takes: first token, each token, end to end.",
    help_epilogue=_BENCH_LATENCY_EXAMPLES,
)
bench.command(
    "spanwise.cli.bench_engine:throughput",
    name="throughput",
    help="Measure requests and tokens a second with all prompts given at once.",
    help_epilogue=_BENCH_THROUGHPUT_EXAMPLES,
)
bench.command(
    "spanwise.cli.bench_engine:startup",
    name="startup",
    help="Measure the time from a process's start to its first token, by phase.",
    help_epilogue=_BENCH_STARTUP_EXAMPLES,
)
bench.command(
    "spanwise.cli.bench_devices:scaling",
    name="scaling",
    help="Measure what more devices bring: data, tensor and pipeline parallel.",
    help_epilogue=_BENCH_SCALING_EXAMPLES,
)
bench.command(
    "spanwise.cli.bench_attention:attention",
    name="attention",
    help="Measure memory and time of standard against flash attention.",
    help_epilogue=_BENCH_ATTENTION_EXAMPLES,
)
bench.command(
    "spanwise.cli.bench_engine:batch",
    name="batch",
    help="Measure throughput and latency against the batch size.",
    help_epilogue=_BENCH_BATCH_EXAMPLES,
)
bench.command(
    "spanwise.cli.bench_devices:methods",
    name="methods",
    help="Measure every way to spread one model over the same devices.",
    help_epilogue=_BENCH_METHODS_EXAMPLES,
)
