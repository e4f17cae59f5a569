"""Train the embedded models, spanwise/tiny-dense and spanwise/tiny-moe.

The data is the source of the Python standard library that runs this script, so nothing is
downloaded. Each model becomes a normal Hugging Face folder under --output. The folder is
rewritten whole at every checkpoint, so a run that is killed leaves a model that loads.

On Linux, MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=2000000000 in the environment
make it a tenth faster: memory is then kept from one step to the next.

Examples:
  python scripts/train_embedded.py --smoke --output build/smoke    # a minute for each model
  python scripts/train_embedded.py --model moe --minutes 65        # the real thing, one core
  python scripts/train_embedded.py --model moe --minutes 80 --resume
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from embedded_training.models import BUILDERS
from embedded_training.training import Training
from transformers.utils.logging import disable_progress_bar

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "spanwise" / "embedded"
CHECKPOINTS = Path(tempfile.gettempdir()) / "spanwise-train"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    summary, _, examples = (__doc__ or "").partition("Examples:")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog="Examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=("dense", "moe", "both"), default="both")
    parser.add_argument("--minutes", type=float, default=65, help="time for each model (65)")
    parser.add_argument("--smoke", action="store_true", help="train for one minute only")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the folders go")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="faster where the CPU has AVX512-BF16")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate (0.005)")
    parser.add_argument("--save-every", type=float, default=5, help="minutes (5)")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.minutes = 1.0
    return options


def main() -> None:
    """Train what the command line asks for."""
    options = parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    for kind in BUILDERS if options.model == "both" else [options.model]:
        Training(kind, options).run()


if __name__ == "__main__":
    main()
