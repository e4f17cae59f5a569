"""Text to token ids and back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from spanwise.engine.chat import ChatOptions, render_chat
from spanwise.engine.token_bytes import TokenBytes, token_bytes_of
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

_DEFAULT = ChatOptions()


class Tokenizer:
    """A model folder's tokenizer, loaded beside the start of the workers.

    A folder may have none: then prompts are token ids and answers have no text.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self._folder = folder
        self._loaded: PreTrainedTokenizerBase | None = None
        self._error: ModelError | None = None
        self.exists = any((folder / name).is_file() for name in _FILES)
        self._thread: threading.Thread | None = None
        self._loading = threading.Lock()

    def start(self) -> None:
        """Load beside what the caller does next.

        Not beside anything else that imports transformers: its lazy modules do not survive imports
        from two threads. Without this, the first use loads.
        """
        if self.exists:
            self._thread = threading.Thread(target=self._load, name="tokenizer", daemon=True)
            self._thread.start()

    @property
    def is_loaded(self) -> bool:
        """Whether nobody has to wait for it any more."""
        return not self.exists or self._loaded is not None

    def wait(self) -> None:
        """Return when the tokenizer is loaded, at once where there is none. Raises ModelError."""
        if self.exists:
            self._tokenizer()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, special tokens added as the tokenizer's own settings say."""
        _check_text(text)
        tokenizer = self._tokenizer()
        # Not verbose: how long a prompt may be is the engine's to say.
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], options: ChatOptions = _DEFAULT
    ) -> list[int]:
        """Token ids of a conversation, by the model's chat template.

        What the conversation's own texts hold is text, also where it spells a special token.
        Raises InputError for a conversation that the template refuses.
        """
        pieces = render_chat(self._tokenizer(), messages, options)
        for piece in pieces:
            _check_text(piece.text)
        first, *others = pieces
        ids = self.encode(first.text, options.add_special_tokens)
        for piece in others:
            ids += self._encode_as_text(piece.text) if piece.is_data else self._go_on(piece.text)
        return ids

    def chat_template(self, with_tools: bool = False) -> str | None:
        """The model's own chat template, or the one it has for tools; None where it has none."""
        templates: str | dict[str, str] | None = self._tokenizer().chat_template
        if isinstance(templates, dict):
            with_tools = with_tools and "tool_use" in templates
            return templates.get("tool_use" if with_tools else "default")
        return templates

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the UTF-8 of a text; b"" for an id that is no token."""
        return self._token_bytes(token_id)

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that were added to the vocabulary, special or not, and their ids."""
        return dict(self._tokenizer().get_added_vocab())

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that a text leaves out where it skips special ones."""
        return frozenset(self._tokenizer().all_special_ids) if self.exists else frozenset()

    @cached_property
    def longest_token(self) -> int:
        """The most characters of a text that one token can stand for."""
        return max(map(len, self._tokenizer().get_vocab()))

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by the part they play: ``eos_token`` and the like."""
        return {name: str(token) for name, token in self._tokenizer().special_tokens_map.items()}

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

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return token_bytes_of(self._tokenizer()) if self.exists else lambda token_id: b""

    def _go_on(self, text: str) -> list[int]:
        """Token ids of a text that follows another."""
        # Where nothing comes before it, sentencepiece puts a space before a text.
        start = self.encode("\n", add_special_tokens=False)
        ids = self.encode("\n" + text, add_special_tokens=False)
        if ids[: len(start)] == start:
            return ids[len(start) :]
        return self.encode(text, add_special_tokens=False)

    def _encode_as_text(self, special: str) -> list[int]:
        """Token ids of the letters that spell a special token."""
        # In two parts it is none any more; asking the tokenizer not to see special tokens would
        # change it for the other threads that use it.
        ids = self._go_on(special[:1]) + self._go_on(special[1:])
        if not set(ids).isdisjoint(self.added_tokens.values()):
            ids = [token_id for letter in special for token_id in self._go_on(letter)]
        return ids

    def _load(self) -> None:
        loader = _loader(self._folder)
        try:
            self._loaded = loader.from_pretrained(str(self._folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises plain ones; raised on use
            self._error = ModelError(
                f"the tokenizer in {self._folder} cannot be loaded: {reason(error)}"
            )

    def _load_once(self) -> None:
        """Return when it is loaded, whichever thread does it."""
        if self._thread is not None:
            self._thread.join()
            return
        with self._loading:
            if self._loaded is None and self._error is None:
                self._load()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if not self.exists:
            raise InputError(
                "the model folder has no tokenizer; give prompt_token_ids instead of text"
            )
        if self._loaded is None:
            self._load_once()
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
