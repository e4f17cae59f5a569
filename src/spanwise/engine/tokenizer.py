"""Text to token ids and back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spanwise.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)


class Tokenizer:
    """A model folder's tokenizer, loaded beside the start of the workers.

    A folder may have none: then prompts are token ids and answers have no text.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: PreTrainedTokenizerBase | None = None
        self._error: ModelError | None = None
        self.exists = any((folder / name).is_file() for name in _FILES)
        self._thread = threading.Thread(target=self._load, name="tokenizer", daemon=True)
        if self.exists:
            self._thread.start()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens added as the tokenizer's own settings say."""
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
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise InputError(f"the chat template refuses the messages: {reason}") from error
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
        from transformers import AutoTokenizer

        try:
            self._loaded = AutoTokenizer.from_pretrained(str(self._folder), local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            self._error = ModelError(f"the tokenizer in {self._folder} cannot be loaded: {reason}")

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if not self.exists:
            raise InputError(
                "the model folder has no tokenizer; give prompt_token_ids instead of text"
            )
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._loaded is not None
        return self._loaded
