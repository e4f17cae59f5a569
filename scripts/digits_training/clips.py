"""Spoken clips as a model is fed with them: varied, normalised, in batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from .voices import SAMPLE_RATE, Cast, draw, speak

TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"efghinorstuvwxz")
VOCABULARY = {token: index for index, token in enumerate(TOKENS)}
POOL = 12  # batches that are drawn together, so that each is of clips of like length
SILENT = 0.02  # of clips in which nobody speaks


@dataclass(frozen=True)
class Clip:
    """Samples at 16 kHz, int16, and what is said in them."""

    samples: torch.Tensor
    text: str


@dataclass(frozen=True)
class Batch:
    """[clips, samples] with their mask, and [clips, labels] filled up with -100."""

    values: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def speak_clips(cast: Cast, count: int, seed: int) -> list[Clip]:
    """Drawn by the seed, spoken one after the other."""
    number = random.Random(seed)
    utterances = [draw(cast, number) for _ in range(count)]
    return [Clip(speak(utterance), utterance.text) for utterance in utterances]


def normalised(samples: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1, as transformers' Wav2Vec2FeatureExtractor does it."""
    samples = samples.float()
    deviation: torch.Tensor = (samples.var(correction=0) + 1e-7).sqrt()
    return (samples - samples.mean()) / deviation


def collate(clips: Sequence[tuple[torch.Tensor, str]]) -> Batch:
    """Normalised and filled up with zeros."""
    values = [normalised(samples) for samples, _ in clips]
    labels = [
        torch.tensor([VOCABULARY[letter] for letter in text.replace(" ", "|")], dtype=torch.long)
        for _, text in clips
    ]
    ones = [torch.ones(len(value), dtype=torch.long) for value in values]
    return Batch(
        pad_sequence(values, batch_first=True),
        pad_sequence(ones, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=-100),
    )


def vary(clip: Clip, number: random.Random, generator: torch.Generator) -> tuple[torch.Tensor, str]:
    """Another pace and pitch, timbre, gain along the clip, silence around it, noise."""
    samples = clip.samples.float() / 32768
    pace = number.uniform(0.86, 1.16)
    samples = interpolate(samples[None, None], scale_factor=pace, mode="linear")[0, 0]
    samples[1:] -= number.uniform(-0.5, 0.6) * samples[:-1].clone()
    text = clip.text
    if number.random() < SILENT:
        samples, text = torch.zeros_like(samples), ""
    samples *= torch.linspace(number.uniform(0.4, 1), number.uniform(0.4, 1), len(samples))
    before, after = (int(number.uniform(0, 0.4) * SAMPLE_RATE) for _ in range(2))
    samples = torch.cat((torch.zeros(before), samples, torch.zeros(after)))
    return noisy(samples, number.uniform(8, 45), number.uniform(0, 0.95), generator), text


def noisy(
    samples: torch.Tensor, ratio_db: float, dullness: float, generator: torch.Generator
) -> torch.Tensor:
    """With noise `ratio_db` below the speech: white at dullness 0, deep at nearly 1."""
    noise = torch.randn(len(samples), generator=generator)
    spectrum = torch.fft.rfft(noise)
    frequency = torch.linspace(0, torch.pi, len(spectrum))
    spectrum /= (1 + dullness**2 - 2 * dullness * frequency.cos()).sqrt()
    noise = torch.fft.irfft(spectrum, len(samples))
    speech = samples.std().clamp_min(1e-3)
    mixed: torch.Tensor = samples + noise / noise.std() * speech * 10 ** (-ratio_db / 20)
    return mixed


def batches(clips: Sequence[Clip], size: int, seed: int) -> Iterator[Batch]:
    """Without end; clips in a batch are of about the same length."""
    number, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        pool = number.sample(clips, size * POOL)
        pool.sort(key=lambda clip: len(clip.samples))
        groups = [pool[start : start + size] for start in range(0, len(pool), size)]
        number.shuffle(groups)
        for group in groups:
            yield collate([vary(clip, number, generator) for clip in group])
