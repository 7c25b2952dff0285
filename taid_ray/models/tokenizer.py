"""Tests of a tokenizer: that it is whole, and that the run's model directory gives the same one again."""

import tempfile
import unicodedata
from typing import Any

from taid_ray.errors import ModelError

PROBES = 200
"""Number of tokens that a tokenizer is tried with."""
LOSSLESS = 0.9
"""Share of these whose text must come back; a few may be parts of characters, or words that no text is ever split into."""
SPLIT = 0.6
"""Tokens per byte of their text at most, where these tokens have MERGED bytes or more on average: 1 if nothing is ever joined."""
FEWEST = 0.1
"""Share of the rows of an embedding that have a token at least; a few per cent may be padding."""
MERGED = 3.0


def check_tokenizer(tokenizer: Any, key: str) -> None:
    """Tries a transformers tokenizer with words of its own vocabulary, as `AutoTokenizer` builds one of incomplete files, too.

    Their text must come back, but for spaces, capitals, accents and forms of characters; and in few tokens. Raises ModelError
    that begins with `key`, the configuration key of the model.
    """
    words = probes(tokenizer)
    remedy = (
        "so files of it are missing or damaged, for example tokenizer.json, or belong to another model; download or save "
        "the model's tokenizer again"
    )
    if not words:
        raise ModelError(
            f"{key}: its tokenizer ({type(tokenizer).__name__}) has no words, only {len(tokenizer.get_vocab())} special "
            f"tokens, {remedy}"
        )
    encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    lost = [word for word, ids in zip(words, encoded, strict=True) if _letters(tokenizer.decode(ids)) != _letters(word)]
    if len(lost) > (1 - LOSSLESS) * len(words):
        raise ModelError(
            f"{key}: its tokenizer ({type(tokenizer).__name__}) loses text: of {len(words)} words of its own vocabulary "
            f"{len(lost)} do not come back when they are encoded and decoded, for example {lost[0]!r}, {remedy}"
        )
    num_tokens, num_bytes = sum(map(len, encoded)), sum(len(word.encode()) for word in words)
    if num_bytes >= MERGED * len(words) and num_tokens > SPLIT * num_bytes:
        raise ModelError(
            f"{key}: its tokenizer ({type(tokenizer).__name__}) splits {len(words)} words of its own vocabulary into "
            f"{num_tokens} tokens, {remedy}"
        )


def check_size(tokenizer: Any, rows: int, key: str) -> None:
    """Checks that a tokenizer may be that of a model with so many rows in its embedding.

    Raises ModelError that begins with `key`, the configuration key of the model.
    """
    named = len(tokenizer.get_vocab())
    if named < FEWEST * rows:
        raise ModelError(
            f"{key}: its tokenizer names {named} tokens, and its embedding has {rows} rows; its files are incomplete, or "
            "of another model; download or save the model's tokenizer again"
        )


def check_saved_tokenizer(tokenizer: Any, model_config: Any) -> None:
    """Checks that a tokenizer saved beside a model of this transformers config is loaded as the same again.

    `AutoTokenizer` chooses a class by the model's type, for some types whatever the tokenizer's own files say. Raises
    ModelError.
    """
    from transformers import AutoTokenizer

    text = " ".join(probes(tokenizer))
    with tempfile.TemporaryDirectory() as directory:
        model_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        again = AutoTokenizer.from_pretrained(directory)
        ids, found = tokenizer.encode(text), again.encode(text)
    if found != ids or again.decode(ids) != tokenizer.decode(ids) or again.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"the student's tokenizer, a {type(tokenizer).__name__}, would not be the same in RUN/model: beside a model of type "
            f"{model_config.model_type} transformers loads it as a {type(again).__name__}, which splits text otherwise; choose a "
            "student whose own family uses this tokenizer"
        )


def probes(tokenizer: Any) -> list[str]:
    """The texts of PROBES ordinary tokens that hold a letter or digit, spread over the vocabulary; fewer if there are no more."""
    added = added_ids(tokenizer)
    ids = [index for index in sorted(tokenizer.get_vocab().values()) if index not in added]
    step = max(1, len(ids) // (2 * PROBES))
    # WordPiece writes ## before what continues a word.
    words = [tokenizer.decode([index]).strip().removeprefix("##") for index in ids[::step]]
    return [word for word in words if any(map(str.isalnum, word)) and "\ufffd" not in word][:PROBES]


def added_ids(tokenizer: Any) -> set[int]:
    """Lists the ids of special tokens, and of others that were added to the vocabulary of a transformers tokenizer."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def _letters(text: str) -> str:
    """Text without what a right tokenizer may change."""
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in decomposed if not c.isspace() and not unicodedata.combining(c))
