"""A WAV file to what a speech model takes, as its folder's preprocessor_config.json says."""

from __future__ import annotations

import wave
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from spanwise.errors import InputError, ModelError, reason

ENDINGS = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac")
_KNOWN = ("Wav2Vec2FeatureExtractor",)
_LEAST_VARIANCE = 1e-7
_WIDEST = 4  # bytes of a sample


class SoundSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of preprocessor_config.json, in transformers' words."""

    feature_extractor_type: str = ""
    sampling_rate: int = 16_000
    do_normalize: bool = True


class Sound:
    """Reads WAV files for one model. Raises ModelError for features that are not known."""

    def __init__(self, settings: SoundSettings, max_audio_s: float) -> None:
        if settings.feature_extractor_type not in _KNOWN:
            raise ModelError(
                f"preprocessor_config.json names {settings.feature_extractor_type or 'no features'}"
                f"; audio can be prepared for {', '.join(_KNOWN)}"
            )
        self._settings, self._max_s = settings, max_audio_s

    def read(self, path: Path) -> NDArray[np.float32]:
        """The samples. Raises InputError saying why they cannot be had."""
        if path.stat().st_size == 0:
            raise InputError("the file is empty")
        if path.suffix.lower() != ".wav":
            raise InputError(
                f"{path.suffix} files are not read; convert it: ffmpeg -i FILE -ar "
                f"{self._settings.sampling_rate} FILE.wav"
            )
        try:
            with wave.open(str(path)) as file:
                samples = self._samples(file)
        except InputError:
            raise
        except Exception as error:  # a broken file may raise anything
            raise InputError(f"the WAV file cannot be read: {reason(error)}") from error
        return self._normalized(samples)

    def _samples(self, file: wave.Wave_read) -> NDArray[np.float32]:
        rate, wanted = file.getframerate(), self._settings.sampling_rate
        num_frames, width = file.getnframes(), file.getsampwidth()
        if width > _WIDEST:
            raise InputError(f"the samples have {8 * width} bits, {8 * _WIDEST} at most")
        if rate != wanted:
            raise InputError(f"the audio has {rate} samples a second, the model takes {wanted}")
        if num_frames == 0:
            raise InputError("the audio is 0 s long")
        if num_frames > self._max_s * rate:
            raise InputError(
                f"the audio is {num_frames / rate:.0f} s long, {self._max_s:g} s at most; cut it, "
                "or raise --max-audio-s"
            )
        octets = file.readframes(num_frames)
        if len(octets) != num_frames * width * file.getnchannels():
            raise InputError("the WAV file is cut off: it is shorter than it says")
        return _mono(octets, width, file.getnchannels())

    def _normalized(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self._settings.do_normalize:
            return samples
        normal: NDArray[np.float32] = (samples - samples.mean()) / np.sqrt(
            samples.var() + _LEAST_VARIANCE
        )
        return normal


def _mono(octets: bytes, width: int, num_channels: int) -> NDArray[np.float32]:
    """Samples from -1 to 1, the mean of all channels."""
    raw = np.frombuffer(octets, np.uint8)
    if width == 1:  # the only one without a sign
        whole, full = raw.astype(np.int32) - 128, 1 << 7
    else:
        wide = np.zeros((len(raw) // width, 4), np.uint8)
        wide[:, 4 - width :] = raw.reshape(-1, width)
        whole, full = wide.view("<i4")[:, 0], 1 << 31
    samples = whole.reshape(-1, num_channels).astype(np.float32) / np.float32(full)
    mean: NDArray[np.float32] = samples.mean(axis=1, dtype=np.float32)
    return mean
