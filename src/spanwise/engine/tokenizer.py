"""Text to token ids and back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from spanwise.errors import InputError, ModelError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)
# AutoTokenizer imports torch and most of transformers, seconds of work, to choose a class. Where
# the folder names the class that needs nothing but tokenizer.json, and transformers does not
# overrule the folder for models of that type, the choice is known.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
TYPES_TAKEN_AT_THEIR_WORD = ("llama", "mixtral", "qwen3", "qwen3_moe", "gpt_oss", "olmo2", "gemma2")


class Tokenizer:
    """A model folder's tokenizer, loaded beside the start of the workers.

    A folder may have none: then prompts are token ids and answers have no text.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: PreTrainedTokenizerBase | None = None
        self._error: ModelError | None = None
        self.exists = any((folder / name).is_file() for name in _FILES)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load beside what the caller does next.

        Not beside anything else that imports transformers: its lazy modules do not survive imports
        from two threads. Without this, the first use loads.
        """
        if self.exists:
            self._thread = threading.Thread(target=self._load, name="tokenizer", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return when the tokenizer is loaded, at once where there is none. Raises ModelError."""
        if self.exists:
            self._tokenizer()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens added as the tokenizer's own settings say."""
        _check_text(text)
        ids: list[int] = self._tokenizer()(text)["input_ids"]
        return ids

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, by the model's chat template, ready for an answer."""
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise InputError("the model has no chat template; give a prompt instead of messages")
        try:
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything; what it says is for the user
            raise InputError(f"the chat template refuses the messages: {reason(error)}") from error
        assert isinstance(text, str)
        _check_text(text)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of tokens, spaces as they were written."""
        if not self.exists:
            return ""
        text = self._tokenizer().decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def _load(self) -> None:
        loader = _loader(self._folder)
        try:
            self._loaded = loader.from_pretrained(str(self._folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises plain ones; raised on use
            self._error = ModelError(
                f"the tokenizer in {self._folder} cannot be loaded: {reason(error)}"
            )

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if not self.exists:
            raise InputError(
                "the model folder has no tokenizer; give prompt_token_ids instead of text"
            )
        if self._thread is not None:
            self._thread.join()
        elif self._loaded is None and self._error is None:
            self._load()
        if self._error is not None:
            raise self._error
        assert self._loaded is not None
        return self._loaded


def _check_text(text: str) -> None:
    """Half of a surrogate pair is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt has half a surrogate pair at character {error.start}; give valid Unicode"
        ) from error


def _loader(folder: Path) -> Any:
    if is_plain(folder):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


class _Config(msgspec.Struct):
    model_type: str = ""


class _TokenizerConfig(msgspec.Struct):
    tokenizer_class: str | None = None
    auto_map: Any = None


def is_plain(folder: Path) -> bool:
    """Whether the tokenizer is just what tokenizer.json says; if not, AutoTokenizer knows."""
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=_Config)
        own = msgspec.json.decode(
            (folder / "tokenizer_config.json").read_bytes(), type=_TokenizerConfig
        )
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return (
        (folder / "tokenizer.json").is_file()
        and own.tokenizer_class in _PLAIN_CLASSES
        and own.auto_map is None
        and config.model_type in TYPES_TAKEN_AT_THEIR_WORD
    )
