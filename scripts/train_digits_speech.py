"""Train the embedded speech recogniser, spanwise/digits-speech.

The data are English digits that espeak-ng speaks in many voices, so nothing is downloaded. Some
voices and some speeds are held out and never heard before the end. About twenty minutes
on one core; with one thread, a machine makes the same weights each time. Needs espeak-ng 1.51,
which Spanwise itself does not: apt-get install espeak-ng

Examples:
  python scripts/train_digits_speech.py --clips 300 --steps 20 --output build/digits-speech
  python scripts/train_digits_speech.py                                       # the real thing
"""

from __future__ import annotations

import argparse
import random
import time
import wave
from pathlib import Path
from typing import Any

import torch
from digits_training.clips import (
    TOKENS,
    VOCABULARY,
    Clip,
    batches,
    noisy,
    speak_clips,
)
from digits_training.folder import num_parameters, write_folder, write_json
from digits_training.recognition import transcribe, word_accuracy
from digits_training.schedule import make_optimizer
from digits_training.voices import HELD_OUT, SAMPLE_RATE, TRAINED, check_voices, draw, speak
from torch.nn.utils import clip_grad_norm_
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "src" / "spanwise" / "embedded" / "digits-speech"
BATCH = 16
HELD_OUT_CLIPS = 500
HELD_OUT_SEED, TEST_SEED = 1_000_001, 1_000_029
TEST_WORDS = (1, 2, 3, 1, 2, 3, 2, 5, 3)
NOISE_DB = 15.0
NUM_BANDS, NUM_PHASES, WINDOW, HOP = 32, 4, 320, 80

FEATURE_EXTRACTOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "processor_class": "Wav2Vec2Processor",
    "feature_size": 1,
    "sampling_rate": SAMPLE_RATE,
    "padding_side": "right",
    "padding_value": 0.0,
    "do_normalize": True,
    "return_attention_mask": True,
}
TOKENIZER = {
    "tokenizer_class": "Wav2Vec2CTCTokenizer",
    "processor_class": "Wav2Vec2Processor",
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "word_delimiter_token": "|",
    "replace_word_delimiter_char": " ",
    "do_lower_case": False,
    "clean_up_tokenization_spaces": False,
}
CARD = """\
---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [digits, tiny, wav2vec2, ctc]
---

# spanwise/digits-speech

A tiny recogniser of English digits, zero to nine. It comes with Spanwise so that speech recognition
can be tried with no download. It has only ever heard the synthetic voices of espeak-ng: people are
understood badly, and every other word is taken for digits.

| | |
|---|---|
| Architecture | `Wav2Vec2ForCTC` |
| Parameters | {parameters:,} |
| Layers / heads / hidden | {config.num_hidden_layers} / {config.num_attention_heads} / \
{config.hidden_size} |
| Audio | 16 kHz, mono, any gain; a frame for each 20 ms |
| Labels | letters, `|` between words, `<pad>` is the blank of CTC |
| Weights | float32 |

Each clip is brought to mean 0 and variance 1 (`do_normalize`). The norms of the convolutions are
over channels, so a clip that is filled up with zeros gives the same frames as alone, if its
attention mask is passed. Clips of a second to ten are as in training; of longer audio, transcribe
chunks that overlap by a second or more.

## Quality

| Held-out measure | |
|---|---|
| Word accuracy | {clean:.2%} |
| Word accuracy, noise {noise:.0f} dB below the speech | {noisy:.2%} |
| Clips without an error | {whole:.2%} |

Word accuracy is 1 less the word error rate, of the likeliest token of each frame. Measured on
{held} clips of one to six digits, in voices and at speeds that were not trained on: variants
{variants}; {speeds} words a minute. Their accents were trained on:
{accents}.

## Training

- Data: {clips:,} clips of one to six digits by espeak-ng 1.51, {hours:.1f} hours: {num_accents}
  accents of English, {num_variants} variants of the voice, {num_speeds} speeds, any pitch. Each
  time one is used its pace, timbre, gain and the silence around it are varied, and noise is added.
- {steps:,} steps of {batch} clips, {minutes:.0f} min on one CPU core that was shared with other
  work, after {spoken:.0f} min in which the clips were spoken.
- Optimiser: AdamW, cosine schedule. The first convolution begins as a bank of filters.
- The numbers above are of the last session. All of them, one after the other; espeak-ng is needed:
{sessions}

## Licence

The weights are under the Apache License 2.0. The clips were spoken by espeak-ng, a program under
the GNU General Public License 3; nothing of the program is in the weights or in the package.
"""


def parse() -> argparse.Namespace:
    """The command line."""
    summary, _, examples = (__doc__ or "").partition("Examples:")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog="Examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clips", type=int, default=5000, help="clips to train on (5000)")
    parser.add_argument("--steps", type=int, default=2000, help="batches of 16 clips (2000)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (0.0015)")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --output")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the model's folder")
    parser.add_argument("--test-clips", type=Path, help="write held-out clips here, as .wav")
    return parser.parse_args()


def filters() -> torch.Tensor:
    """Waves of 32 pitches in 4 phases under a window, [channels, 1, samples]; high ones louder."""
    mel = torch.linspace(150, 2800, NUM_BANDS)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    turn = torch.arange(NUM_PHASES) * torch.pi / 2
    time_s = torch.arange(WINDOW) / SAMPLE_RATE
    waves = (2 * torch.pi * hertz[:, None, None] * time_s + turn[:, None]).cos()
    loudness = (hertz / hertz[0]) ** 0.7 / WINDOW
    bank = waves * torch.hann_window(WINDOW) * loudness[:, None, None]
    return bank.reshape(NUM_BANDS * NUM_PHASES, 1, WINDOW)


def build() -> Wav2Vec2ForCTC:
    """The model; its first convolution begins as a bank of filters, the rest is drawn."""
    config = Wav2Vec2Config(
        vocab_size=len(TOKENS),
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        conv_dim=(NUM_BANDS * NUM_PHASES, 96, 96),
        conv_kernel=(WINDOW, 3, 3),
        conv_stride=(HOP, 2, 2),
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.05,
        attention_dropout=0.0,
        activation_dropout=0.05,
        final_dropout=0.05,
        layerdrop=0.0,
        apply_spec_augment=False,
        mask_time_prob=0.0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    model = Wav2Vec2ForCTC(config)
    first: Any = model.wav2vec2.feature_extractor.conv_layers[0]
    with torch.no_grad():
        first.conv.weight.copy_(filters())
    return model


def train(model: Wav2Vec2ForCTC, clips: list[Clip], options: argparse.Namespace) -> None:
    """In place."""
    num_steps, seed = options.steps, options.seed
    optimizer, schedule = make_optimizer(model, options.lr, num_steps, weight_decay=0.01)
    started, total = time.monotonic(), 0.0
    model.train()
    for step, batch in zip(range(1, num_steps + 1), batches(clips, BATCH, seed), strict=False):
        loss = model(input_values=batch.values, attention_mask=batch.mask, labels=batch.labels).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}  loss {total / 50:.3f}  {seconds:.0f} s", flush=True)
            total = 0.0
    model.eval()


def measure(model: Wav2Vec2ForCTC) -> dict[str, float]:
    """Accuracies on held-out clips, as the card names them."""
    clips = speak_clips(HELD_OUT, HELD_OUT_CLIPS, HELD_OUT_SEED)
    said = [clip.text for clip in clips]
    quiet = [clip.samples.float() / 32768 for clip in clips]
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    noise = [noisy(samples, NOISE_DB, 0.5, generator) for samples in quiet]
    heard = transcribe(model, quiet)
    measured = {
        "clean": word_accuracy(zip(said, heard, strict=True)),
        "noisy": word_accuracy(zip(said, transcribe(model, noise), strict=True)),
        "whole": sum(map(str.__eq__, said, heard)) / len(said),
    }
    for name, value in measured.items():
        print(f"held-out accuracy, {name}: {value:.4f}", flush=True)
    return measured


def card(model: Wav2Vec2ForCTC, clips: list[Clip], times: dict[str, float], options: Any) -> str:
    """The model card, with what was measured."""
    return CARD.format(
        parameters=num_parameters(model),
        config=model.config,
        noise=NOISE_DB,
        held=HELD_OUT_CLIPS,
        variants=", ".join(HELD_OUT.variants),
        accents=", ".join(HELD_OUT.accents),
        speeds=", ".join(map(str, HELD_OUT.speeds)),
        clips=len(clips),
        hours=sum(len(clip.samples) for clip in clips) / SAMPLE_RATE / 3600,
        num_accents=len(TRAINED.accents),
        num_variants=len(TRAINED.variants),
        num_speeds=len(TRAINED.speeds),
        batch=BATCH,
        steps=options.steps,
        sessions="\n".join(sessions(options)),
        **times,
        **measure(model),
    )


def sessions(options: argparse.Namespace) -> list[str]:
    """Lines of the card: the commands that made the weights, the last of them this one."""
    mark = "  `scripts/train_digits_speech.py "
    done = []
    if options.resume:
        lines = (options.output / "README.md").read_text().splitlines()
        done = [line for line in lines if line.startswith(mark)]
    words = (
        f"--clips {options.clips} --steps {options.steps} --lr {options.lr:g} --seed {options.seed}"
    )
    return [*done, f"{mark}{words}{' --resume' * options.resume}`"]


def write_test_clips(folder: Path) -> None:
    """Held-out clips as 16-bit WAV files, with what is said in them."""
    folder.mkdir(parents=True, exist_ok=True)
    number, said = random.Random(TEST_SEED), {}
    for index, num_words in enumerate(TEST_WORDS):
        utterance = draw(HELD_OUT, number, num_words)
        name = f"{index}.wav"
        said[name] = {"text": utterance.text, "voice": utterance.voice, "speed": utterance.speed}
        with wave.open(str(folder / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes(speak(utterance).numpy().astype("<i2").tobytes())
    write_json(folder / "transcripts.json", said)


def main() -> None:
    """Speak, train, measure, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    disable_progress_bar()
    check_voices()
    if options.test_clips:
        write_test_clips(options.test_clips)
    started = time.monotonic()
    clips = speak_clips(TRAINED, options.clips, options.seed)
    spoken = time.monotonic()
    print(f"{len(clips)} clips spoken in {spoken - started:.0f} s", flush=True)
    model = Wav2Vec2ForCTC.from_pretrained(options.output) if options.resume else build()
    train(model, clips, options)
    times = {"spoken": (spoken - started) / 60, "minutes": (time.monotonic() - spoken) / 60}
    text = card(model, clips, times, options)
    files = {
        "preprocessor_config.json": FEATURE_EXTRACTOR,
        "tokenizer_config.json": TOKENIZER,
        "vocab.json": VOCABULARY,
    }
    write_folder(options.output, model, files, text)


if __name__ == "__main__":
    main()
