"""A prompt for reading its words: its embeddings, and which of the text's tokens each word became."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trace_sdk.backbones.prompts import Prompt, encode, missing_text_parts
from trace_sdk.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from trace_sdk.backbones.latent import LatentBackbone

WORD = r"\w+(?:['’-]\w+)*"


@dataclass(frozen=True)
class WordedPrompt:
    """A prompt as a model takes it.

    Attributes:
        text: the prompt.
        embeddings: the text encoders' answer, batch of 1, on the CPU.
        pieces: (start, end, position) of each text token that stands for a part of the prompt: its characters in
            `text`, and its place along `embeddings["tokens"]`. A word may have tokens of two text encoders.
    """

    text: str
    embeddings: Prompt
    pieces: tuple[tuple[int, int, int], ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the prompt in order, each once, in lower case."""
        return tuple(dict.fromkeys(re.findall(WORD, self.text.lower())))

    def positions(self, word: str) -> list[int]:
        """Where a word or phrase lies along `embeddings["tokens"]`, all of its occurrences, in any case.

        Raises:
            ArgumentError: the prompt does not have it, or only beyond what the text encoder takes.
        """
        phrase = r"\s".join(map(re.escape, word.split()))
        spans = [found.span() for found in re.finditer(rf"(?<!\w){phrase}(?!\w)", self.text, re.IGNORECASE)]
        if not phrase or not spans:
            raise ArgumentError(f"{word!r} is not in the prompt {self.text!r}. Its words: {', '.join(self.words)}.")
        positions = [
            position
            for start, end, position in self.pieces
            if any(start < last and end > first for first, last in spans)
        ]
        if not positions:
            raise ArgumentError(f"{word!r} lies beyond what the model's text encoder takes. Shorten the prompt.")
        return sorted(positions)


def read_words(
    family: type[LatentBackbone],
    folder: Path,
    index: dict[str, Any],
    text: str,
    device: torch.device,
    dtype: torch.dtype,
) -> WordedPrompt:
    """Embed a prompt by the folder's own text encoders, and see which tokens its words become.

    Raises:
        ArgumentError: the prompt is empty.
        CheckpointError: text encoders or tokenizers are missing, cannot be run, or don't say where tokens come from.
        OutOfMemoryError: the text encoders don't fit.
    """
    text = " ".join(text.split())
    if not re.search(WORD, text):
        raise ArgumentError("The prompt has no words.")
    if missing := missing_text_parts(folder, index):
        raise CheckpointError(
            f"{folder} has no {missing}, without which no prompt can be read. Give the whole diffusers folder, or "
            "leave the prompt out."
        )
    listeners = {name: _Listener() for name in family.words}

    def listen(pipeline: Any) -> None:
        for name, listener in listeners.items():
            listener.tokenizer = getattr(pipeline, name)
            object.__setattr__(pipeline, name, listener)  # the pipeline's own would look for its class on disk

    embeddings = encode(family, folder, index, text, device, dtype, listen)
    length = embeddings["tokens"].shape[1]
    pieces = []
    for name, offset in family.words.items():
        for start, end, place in listeners[name].pieces(text, family.drops_padding, f"{folder / name}"):
            if 0 <= place + offset < length:
                pieces.append((start, end, place + offset))
    return WordedPrompt(text, embeddings, tuple(pieces))


class _Listener:
    """Stands where a tokenizer was: everything goes on to it, and what it was asked first is kept."""

    tokenizer: Any
    asked: str | None = None
    answer: Any = None

    def __call__(self, text: str | list[str], *args: Any, **kwargs: Any) -> Any:
        answer = self.tokenizer(text, *args, **kwargs)
        if self.asked is None:
            self.asked, self.answer = text if isinstance(text, str) else text[0], answer
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def pieces(self, prompt: str, drops_padding: bool, source: str) -> list[tuple[int, int, int]]:
        """(start, end, place) of the tokens of `prompt` in what was asked, which may have a template around it."""
        encodings = getattr(self.answer, "encodings", None)
        start = (self.asked or "").lower().rfind(prompt.lower())
        if not encodings or start < 0:
            raise CheckpointError(f"{source} does not say which tokens a word becomes, so its words cannot be read.")
        found, place = [], 0
        for (first, last), mask in zip(encodings[0].offsets, encodings[0].attention_mask, strict=True):
            inside = mask and first < last and first < start + len(prompt) and last > start
            if inside:
                found.append((first - start, last - start, place))
            place += 1 if mask or not drops_padding else 0
        return found
