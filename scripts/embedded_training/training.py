"""The loop: batches, steps, checkpoints."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .batches import Batches, rate, shape_of_batch
from .corpus import read_corpus
from .export import export
from .models import BUILDERS
from .optimizers import build_optimizers
from .tokenizer import encode_corpus, train_tokenizer
from .trained import Progress, Trained


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
        trained = Trained(
            self.kind, self.model, self.tokenizer, self.held, self.bytes, self.unique, self.progress
        )
        export(trained, self.folder, final=final)
