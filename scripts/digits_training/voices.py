"""Who says the digits, and how: drawn, and spoken by espeak-ng."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import conv1d, pad

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAMPLE_RATE = 16_000
SPOKEN_RATE = 22_050  # espeak-ng's own
WAV_HEADER_BYTES = 44


@dataclass(frozen=True)
class Cast:
    """Accents, variants of the voice, and speeds (words a minute) to draw from."""

    accents: tuple[str, ...]
    variants: tuple[str, ...]
    speeds: tuple[int, ...]


TRAINED = Cast(
    (
        *("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan"),
        *("en-gb-x-gbcwmd", "en-us-nyc"),
    ),
    (
        *("m1", "m2", "m3", "m5", "m6", "m8", "f1", "f3", "f4", "Alex", "Andy", "Annie", "Gene"),
        *("Jacky", "Lee", "Mario", "Michael", "adam", "anika", "belinda", "benjamin", "boris"),
        *("caleb", "david", "ed", "edward", "grandma", "grandpa", "iven", "john", "linda", "max"),
        *("paul", "pedro", "quincy", "rob", "steph", "victor", "zac", "klatt", "klatt3"),
        *("Andrea", "Denis", "Diogo", "Henrique", "Hugo", "Marco", "Mike", "antonio", "aunty"),
        *("gustave", "iven2", "marcelo", "michel", "miguel", "norbert", "pablo", "sandro"),
        *("shelby", "travis", "klatt2", "edward2"),
    ),
    (110, 120, 130, 150, 160, 170, 190, 200, 210, 230),
)
HELD_OUT = Cast(
    ("en-us", "en-gb", "en-us-nyc"),
    ("m4", "m7", "f2", "f5", "Alicia", "robert"),
    (140, 180, 220),
)


@dataclass(frozen=True)
class Utterance:
    """What is said, and how. `gap`: between words, in units of 10 ms at the usual speed."""

    words: tuple[str, ...]
    voice: str
    speed: int
    pitch: int
    amplitude: int
    gap: int
    commas: bool

    @property
    def text(self) -> str:
        """The transcript."""
        return " ".join(self.words)


def draw(cast: Cast, number: random.Random, num_words: int | None = None) -> Utterance:
    """One to six digits, or as many as asked for, by one of the cast."""
    return Utterance(
        tuple(number.choices(WORDS, k=num_words or number.randint(1, 6))),
        f"{number.choice(cast.accents)}+{number.choice(cast.variants)}",
        number.choice(cast.speeds),
        number.randint(20, 80),
        number.randint(40, 160),
        number.choice((0, 0, 0, 2, 5, 10, 20)),
        number.random() < 0.25,
    )


def speak(utterance: Utterance) -> torch.Tensor:
    """Samples at 16 kHz, int16. Exits with a line that says why where espeak-ng cannot."""
    command = ["espeak-ng", "--stdout", "-z", "-v", utterance.voice]
    for option, value in (
        ("-s", utterance.speed),
        ("-p", utterance.pitch),
        ("-a", utterance.amplitude),
        ("-g", utterance.gap),
    ):
        command += [option, str(value)]
    text = (", " if utterance.commas else " ").join(utterance.words)
    done = subprocess.run([*command, text], capture_output=True, check=False)
    if done.returncode or len(done.stdout) <= WAV_HEADER_BYTES:
        sys.exit(f"espeak-ng said nothing as {utterance.voice}: {done.stderr.decode().strip()}")
    samples = torch.frombuffer(bytearray(done.stdout[WAV_HEADER_BYTES:]), dtype=torch.int16)
    return resample(samples.float()).round().clamp(-32768, 32767).short()


def check_voices() -> None:
    """Exit with one line unless espeak-ng is there and has every voice: it says nothing if not."""
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed; on Debian: apt-get install espeak-ng")
    wanted = {variant for cast in (TRAINED, HELD_OUT) for variant in cast.variants}
    missing = wanted - set(_listed("variant", "!v/"))
    accents = {accent for cast in (TRAINED, HELD_OUT) for accent in cast.accents}
    missing |= accents - set(_listed("en", ""))
    if missing:
        sys.exit(f"this espeak-ng lacks {', '.join(sorted(missing))}; 1.51 has them")


def _listed(kind: str, folder: str) -> Iterator[str]:
    """Names that espeak-ng lists: of files in `folder`, or of languages where it is empty."""
    command = ["espeak-ng", f"--voices={kind}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line in lines[1:]:
        if not folder:
            yield line.split()[1]
        elif folder in line:
            yield line.partition(folder)[2].split()[0]


def resample(samples: torch.Tensor) -> torch.Tensor:
    """From espeak-ng's rate to 16 kHz by a windowed sinc. [samples] to [samples * 320 / 441]."""
    up, down, reach = 320, 441, 32
    taps = torch.arange(-reach, down + reach)
    distance = torch.arange(up)[:, None] * down / up - taps
    cutoff = 0.95 * up / down
    window = torch.where(distance.abs() < reach, (distance * torch.pi / 2 / reach).cos() ** 2, 0)
    kernel = cutoff * torch.sinc(cutoff * distance) * window
    blocks = conv1d(pad(samples, (reach, reach + down))[None, None], kernel[:, None], stride=down)
    return blocks[0].T.reshape(-1)[: len(samples) * up // down]
