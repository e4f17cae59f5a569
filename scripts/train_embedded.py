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
import ast
import hashlib
import math
import os
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "spanwise" / "embedded"
CHECKPOINTS = Path(tempfile.gettempdir()) / "spanwise-train"

# ---------------------------------------------------------------------------------- data

SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"),
    *("test", "tests", "idle_test", "ensurepip"),
}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "test_")  # names of a folder or of a file
SKIPPED_FILES = {"html/entities.py", "locale.py", "stringprep.py", "__phello__/spam.py"}  # tables


def wanted(relative: Path) -> bool:
    """Whether this file of the standard library is part of the data."""
    return (
        relative.as_posix() not in SKIPPED_FILES
        and SKIPPED_FOLDERS.isdisjoint(relative.parts)
        and not any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts)
    )


def held_out(relative: Path) -> bool:
    """Whether a file is kept from training: 3 in 100, chosen by a hash of its path."""
    return int(hashlib.sha256(relative.as_posix().encode()).hexdigest(), 16) % 100 < 3


def read_corpus() -> tuple[list[str], list[str]]:
    """The texts to train on and the held-out ones, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    held: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if wanted(relative):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                (held if held_out(relative) else train).append(text)
    return train, held


def chat_texts(source: str) -> Iterator[tuple[str, str]]:
    """Questions and answers from one file: 'Write `def f(x)`: <its docstring>' and the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            code = ast.unparse(node)
            if len(code) <= 600 and node.name.isidentifier():
                what = " ".join(doc.split("\n\n")[0].split())
                yield (
                    f"Write a Python function `{node.name}({ast.unparse(node.args)})`: {what}",
                    f"{code}\n",
                )


# ----------------------------------------------------------------------------- tokenizer

PAD, BOS, EOS, START, END = "<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, BOS, EOS, START, END)  # their ids are 0, 1, 2, 3, 4
VOCABULARY = 4096
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that begins every text with <|bos|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[START, END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode_corpus(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """Every document as ids: <|bos|> text <|eos|>, for files and for chats."""
    chats: list[Any] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
        for text in texts
        for question, answer in chat_texts(text)
    ]
    chosen = random.Random(0).sample(chats, min(len(chats), 1500))
    backend = tokenizer.backend_tokenizer
    files = backend.encode_batch([text + EOS for text in texts])
    dialogues = backend.encode_batch([text + EOS for text in chosen], add_special_tokens=False)
    return [torch.tensor(encoding.ids) for encoding in [*files, *dialogues]]


# -------------------------------------------------------------------------------- models

SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": SPECIAL.index(PAD),
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
    "rms_norm_eps": 1e-6,
    "use_cache": True,
}


def build_dense() -> PreTrainedModel:
    """tiny-dense, of the Llama architecture."""
    return LlamaForCausalLM(LlamaConfig(hidden_size=192, intermediate_size=576, **SHARED))


def build_moe() -> PreTrainedModel:
    """tiny-moe, of the Qwen3-MoE architecture: 8 experts, 2 of them for each token."""
    config = Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.01,
        **SHARED,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # the fastest to train on a CPU
    return model


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {"dense": build_dense, "moe": build_moe}

# ------------------------------------------------------------------------------ training


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal (Newton-Schulz, five steps).

    A tensor with three dimensions is a stack of matrices, which is how experts are stored.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @staticmethod
    def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        """The nearest orthogonal matrix, roughly."""
        tall = matrix.size(-2) > matrix.size(-1)
        x: torch.Tensor = matrix.mT if tall else matrix
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = self.orthogonal(param.grad.lerp(momentum, group["momentum"]))
                scale = 0.2 * math.sqrt(max(param.shape[-2:]))  # as large as an update of Adam
                param.mul_(1 - group["lr"] * group["decay"])
                param.add_(update, alpha=-group["lr"] * scale)


def build_optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and routers."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, param in model.named_parameters():
        inner = param.ndim >= 2 and "embed" not in name and not name.endswith("mlp.gate.weight")
        (matrices if inner else others).append(param)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    return [Muon(matrices, lr=lr), adam]


def rate(fraction: float) -> float:
    """The learning rate at this fraction of the time: a short warm-up, then a cosine to 0."""
    warm = 0.02
    if fraction < warm:
        return max(fraction, 0.001) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - warm) / (1 - warm))))


def shape_of_batch(fraction: float) -> tuple[int, int]:
    """(rows, tokens of a row): short and few at first, long at the end."""
    if fraction < 0.4:
        return 12, 256
    if fraction < 0.8:
        return 6, 512
    return (4, 1024) if fraction < 0.97 else (2, 2048)


class Batches:
    """Rows of ids from documents in a random order, without end; each row begins with <|bos|>."""

    def __init__(self, documents: list[torch.Tensor], seed: int) -> None:
        self.documents = documents
        self.random = random.Random(seed)
        self.stream = torch.empty(0, dtype=torch.long)

    def next(self, rows: int, length: int) -> torch.Tensor:
        """The next batch: rows drawn from all over the documents, [rows, length]."""
        count = rows * (length - 1)
        if len(self.stream) < count:
            self.refill()
        taken, self.stream = self.stream[:count], self.stream[count:]
        return functional.pad(taken.view(rows, length - 1), (1, 0), value=SPECIAL.index(BOS))

    def refill(self) -> None:
        """One more pass over the documents, cut in pieces of 2047 ids in a random order."""
        self.random.shuffle(self.documents)
        ids = torch.cat(self.documents)[self.random.randrange(2047) :]
        pieces = list(ids[: len(ids) // 2047 * 2047].view(-1, 2047))
        self.random.shuffle(pieces)
        self.stream = torch.cat([self.stream, *pieces])


@dataclass
class Progress:
    """How far a training has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan


@dataclass
class Training:
    """One model with all that its training needs."""

    kind: str
    options: argparse.Namespace

    def __post_init__(self) -> None:
        torch.manual_seed(self.options.seed)
        texts, self.held = read_corpus()
        self.bytes = sum(len(text.encode()) for text in texts)
        self.tokenizer = train_tokenizer(texts)
        documents = encode_corpus(self.tokenizer, texts)
        self.batches = Batches(documents, self.options.seed)
        self.unique = sum(len(document) for document in documents)
        self.model = BUILDERS[self.kind]()
        self.optimizers = build_optimizers(self.model, self.options.lr)
        self.progress = Progress()
        self.folder: Path = self.options.output / f"tiny-{self.kind}"
        self.checkpoint: Path = self.options.checkpoints / f"tiny-{self.kind}.pt"
        self.budget = self.options.minutes * 60

    def run(self) -> None:
        """Train until the time is up, with an export every few minutes and one at the end."""
        if self.options.resume and self.checkpoint.exists():
            self.restore()
        started = time.monotonic() - self.progress.seconds
        next_save = self.progress.seconds + min(60, self.budget / 3)
        print(f"{self.kind}: {self.bytes:,} bytes, {self.unique:,} tokens", flush=True)
        while self.progress.seconds < self.budget:
            self.step()
            self.progress.seconds = time.monotonic() - started
            if self.progress.step % 20 == 0:
                self.report()
            if self.progress.seconds >= next_save:
                self.save(final=False)
                next_save = time.monotonic() - started + self.options.save_every * 60
        self.save(final=True)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, with the routers' balance where there are routers."""
        extras = {"output_router_logits": True} if self.kind == "moe" else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.bf16):
            out = self.model(input_ids=ids, labels=ids, use_cache=False, **extras)
        loss: torch.Tensor = out.loss
        return loss

    def step(self) -> None:
        """One batch, one update."""
        fraction = self.progress.seconds / self.budget
        ids = self.batches.next(*shape_of_batch(fraction))
        loss = self.loss(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr * rate(fraction)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        old = self.progress.loss
        self.progress.loss = value if math.isnan(old) else 0.95 * old + 0.05 * value
        self.progress.step += 1
        self.progress.tokens += ids.numel()

    def report(self) -> None:
        """One line of progress."""
        now = self.progress
        left = max(0.0, self.budget - now.seconds) / 60
        speed = now.tokens / max(now.seconds, 1e-9)
        print(
            f"{self.kind}: step {now.step}  loss {now.loss:.3f}  {speed:.0f} tok/s"
            f"  {now.tokens / self.unique:.2f} epochs  {left:.1f} min left",
            flush=True,
        )

    def restore(self) -> None:
        """Go on from the last checkpoint."""
        saved = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(**saved["progress"])
        self.batches.random.seed(self.options.seed + self.progress.step)

    def save(self, *, final: bool) -> None:
        """Write the checkpoint and the model's folder."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": vars(self.progress),
        }
        scratch = self.checkpoint.with_suffix(".new")
        torch.save(state, scratch)
        scratch.replace(self.checkpoint)
        export(self, final=final)


# ---------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Quality:
    """How well a model predicts held-out text, all of it: bytes, tokens and nats."""

    bytes: int
    tokens: int
    nats: float

    @property
    def per_byte(self) -> float:
        """Perplexity per byte."""
        return math.exp(self.nats / self.bytes)

    @property
    def per_token(self) -> float:
        """Perplexity per token."""
        return math.exp(self.nats / self.tokens)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int
) -> Quality:
    """Quality on the first `limit` bytes of the texts.

    Windows of 1024 tokens, half of which is context that was scored before; the first window
    of a text has no context but <|bos|>.
    """
    size = tokens = 0
    nats = 0.0
    for text in texts:
        text = text.encode()[: max(0, limit - size)].decode(errors="ignore")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        for start in range(0, max(1, len(ids) - 512), 512):
            window = ids[start : start + 1024]
            first = 512 if start else 1  # the first id to score
            with torch.no_grad():
                logits = model(input_ids=window[None], use_cache=False).logits[0]
            scored = functional.cross_entropy(
                logits[first - 1 : -1].float(), window[first:], reduction="sum"
            )
            nats += scored.item()
        size += len(text.encode())
        tokens += len(ids) - 1
    return Quality(size, tokens, nats)


# -------------------------------------------------------------------------------- export

CARD = """\
---
license: apache-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
tags: [python, tiny, {tag}]
---

# {name}

A tiny {what}. It comes with Spanwise so that every
feature of the engine can be tried with no download. It writes text that looks like Python. It
does not know what the code means: use it to test software, not to get answers.

| | |
|---|---|
| Architecture | `{architecture}` |
| Parameters | {parameters} |
| Layers / heads / key-value heads | {layers} / {heads} / {kv_heads} |
| Vocabulary | {vocabulary} tokens, byte-level BPE |
| Context | 2048 tokens |
| Weights | bfloat16, tied embeddings |

## Quality

| Held-out measure | |
|---|---|
| Perplexity per byte | {per_byte:.3f} |
| Perplexity per token | {per_token:.2f} |
| Bits per byte | {bits:.3f} |

Measured on {held_bytes:,} bytes ({held_tokens:,} tokens) of {held_files} files that were not
trained on, with the bfloat16 weights of this folder: windows of 1024 tokens, at least 512 tokens
of context where the file has them.{note}

## Training

- Data: the source of the Python {python} standard library, {train_bytes:,} bytes, without
  `encodings`, `pydoc_data`, tests and tables. Files are held out by a hash of their path.
  1500 short functions with a docstring are also shown as chats.
- Tokens seen: {tokens:,} ({epochs:.1f} epochs), in {steps:,} steps.
- Time: {minutes:.0f} min on one CPU core that was shared with other work.
- Optimiser: Muon for the matrices, AdamW for the rest, cosine schedule.
- Script: `scripts/train_embedded.py --model {kind}`.

Every text begins with `<|bos|>` and ends with `<|eos|>`. The chat template is ChatML; an answer
ends with `<|im_end|>`.

## Licence

The weights are under the Apache License 2.0. They were trained on the standard library of
CPython, which is under the Python Software Foundation License Version 2; the model can repeat
short parts of it.
"""


def count(model: PreTrainedModel) -> str:
    """The number of parameters, and how many of them a token uses."""
    total = sum(param.numel() for param in model.parameters())
    config = model.config
    if not hasattr(config, "num_experts"):
        return f"{total:,}"
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_hidden_layers * (config.num_experts - config.num_experts_per_tok) * expert
    return f"{total:,}, {total - idle:,} for a token ({config.num_experts} experts, " + (
        f"{config.num_experts_per_tok} for a token)"
    )


def card(training: Training, quality: Quality, final: bool) -> str:
    """The model card."""
    moe = training.kind == "moe"
    config, progress = training.model.config, training.progress
    return CARD.format(
        name=f"spanwise/tiny-{training.kind}",
        kind=training.kind,
        tag="mixture-of-experts" if moe else "dense",
        what="mixture-of-experts model of Python code" if moe else "dense model of Python code",
        architecture=type(training.model).__name__,
        parameters=count(training.model),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        per_byte=quality.per_byte,
        per_token=quality.per_token,
        bits=math.log2(quality.per_byte),
        held_bytes=quality.bytes,
        held_tokens=quality.tokens,
        held_files=len(training.held) if final else "the first",
        note="" if final else "\nTraining is not finished: this is an early checkpoint.",
        python=sysconfig.get_python_version(),
        train_bytes=training.bytes,
        tokens=progress.tokens,
        epochs=progress.tokens / training.unique,
        steps=progress.step,
        minutes=progress.seconds / 60,
    )


def generation_config() -> GenerationConfig:
    """Greedy; stops at the end of a text and at the end of a chat's turn."""
    return GenerationConfig(
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=[SPECIAL.index(EOS), SPECIAL.index(END)],
    )


def use_common_names(folder: Path) -> None:
    """Undo two names that only the newest transformers knows."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_local_experts"', '"num_experts"'))
    tokenizer = folder / "tokenizer_config.json"
    text = tokenizer.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    tokenizer.write_text(text)


def export(training: Training, *, final: bool) -> None:
    """Write the model's folder whole, and only then put it in the place of the old one."""
    rounded: Any = BUILDERS[training.kind]()
    rounded.load_state_dict(training.model.state_dict())
    rounded.to(torch.bfloat16)
    rounded.generation_config = generation_config()
    new = training.folder.with_name(f".{training.folder.name}.new")
    old = training.folder.with_name(f".{training.folder.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    rounded.save_pretrained(new)
    training.tokenizer.save_pretrained(new)
    for path in new.iterdir():
        path.chmod(0o644)
    use_common_names(new)
    rounded.float().eval()
    limit = 10**9 if final else 30_000
    quality = measure(rounded, training.tokenizer, training.held, limit)
    (new / "README.md").write_text(card(training, quality, final), encoding="utf-8")
    if training.folder.exists():
        training.folder.rename(old)
    new.rename(training.folder)
    shutil.rmtree(old, ignore_errors=True)
    print(
        f"{training.kind}: exported; held-out perplexity {quality.per_byte:.3f} per byte,"
        f" {quality.per_token:.2f} per token",
        flush=True,
    )


# ----------------------------------------------------------------------------- arguments


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
