"""Tokenizers of every kind are accepted; incomplete ones, and ones that a reload changes, are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from taid_ray.config.models import TeacherConfig
from taid_ray.errors import ModelError
from taid_ray.models.loading import load_tokenizer
from taid_ray.models.tokenizer import check_saved_tokenizer, check_size, check_tokenizer
from tests.support.paths import BUNDLE, SHARED

UNKNOWN: dict[str, Any] = {"special_tokens": ["<unk>"]}
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def texts() -> list[str]:
    stories = (BUNDLE / "tinystories_train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    others = [
        "Привет, мир! Как дела?",
        "naïve café déjà vu Ångström",
        "你好世界 今天天气很好",
        "हिन्दी में लिखा हुआ",
        "ﬁne ½ ① ℌ",
    ]
    return [json.loads(line)["text"] for line in stories] + others * 5


def word_piece() -> tuple[Any, Any, Any, Any, Any]:
    """Of BERT: makes capitals small, and removes accents."""
    trainer = trainers.WordPieceTrainer(vocab_size=2000, **UNKNOWN)
    normalizer = normalizers.BertNormalizer(lowercase=True)
    return (
        models.WordPiece(unk_token="<unk>"),
        normalizer,
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        trainer,
    )


def unigram() -> tuple[Any, Any, Any, Any, Any]:
    """Of T5, which changes forms of characters."""
    trainer = trainers.UnigramTrainer(vocab_size=900, unk_token="<unk>", **UNKNOWN)
    return models.Unigram(), normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace(), trainer


def word_level() -> tuple[Any, Any, Any, Any, Any]:
    trainer = trainers.WordLevelTrainer(vocab_size=500, **UNKNOWN)
    return models.WordLevel(unk_token="<unk>"), None, pre_tokenizers.Whitespace(), None, trainer


def characters() -> tuple[Any, Any, Any, Any, Any]:
    trainer = trainers.BpeTrainer(vocab_size=100, **UNKNOWN)
    return models.BPE(unk_token="<unk>"), None, pre_tokenizers.Split("", "isolated"), None, trainer


def byte_level() -> tuple[Any, Any, Any, Any, Any]:
    """Of GPT-2; with digits one by one."""
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=ALPHABET)
    return models.BPE(), None, pre_tokenizers.Sequence(split), decoders.ByteLevel(), trainer


def bytes_alone() -> tuple[Any, Any, Any, Any, Any]:
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=ALPHABET)
    return models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), trainer


@pytest.mark.parametrize("kind", [word_piece, unigram, word_level, characters, byte_level, bytes_alone])
def test_every_kind_of_tokenizer_is_accepted(kind: Callable[[], tuple[Any, Any, Any, Any, Any]]) -> None:
    model, normalizer, pre_tokenizer, decoder, trainer = kind()
    trainer.show_progress = False
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizer
    for name, part in (("normalizer", normalizer), ("decoder", decoder)):
        if part is not None:
            setattr(made, name, part)
    made.train_from_iterator(texts(), trainer)
    check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"), "student.model")


def test_tokenizers_of_well_known_models_are_accepted() -> None:
    check_tokenizer(ByT5Tokenizer(), "teacher.model")
    load_tokenizer(TeacherConfig(model=str(BUNDLE / "stories260k")))
    for name in ("gpt2", "qwen1.5", "tinyllama") if SHARED.is_dir() else ():
        load_tokenizer(TeacherConfig(model=str(SHARED / "tokenizers" / name)))


@pytest.mark.parametrize("model_config", [Qwen2Config, GPT2Config, LlamaConfig])
def test_a_directory_without_the_tokenizers_files_is_refused(model_config: Any, tmp_path: Path) -> None:
    """transformers builds a tokenizer of nothing but the special tokens, which drops every word."""
    model_config().save_pretrained(tmp_path)
    added = {"5": {"content": "<think>", "special": False}, "6": {"content": "<|im_end|>", "special": True}}
    settings = {"tokenizer_class": model_config.__name__.replace("Config", "Tokenizer"), "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError, match=r"^teacher\.model = .*has no words, only \d+ special tokens.*save the model's tok"
    ):
        load_tokenizer(TeacherConfig(model=str(tmp_path)))


def test_a_tokenizer_that_another_class_reads_is_refused(tmp_path: Path) -> None:
    """Beside a Qwen2 model transformers splits text as Qwen2 does, whatever the vocabulary is."""
    tokenizer = load_tokenizer(TeacherConfig(model=str(BUNDLE / "stories260k")))
    Qwen2Config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is not type(tokenizer)
    with pytest.raises(ModelError, match=r"teacher\.model = .*splits 200 words of its own vocabulary into 1200 tokens"):
        load_tokenizer(TeacherConfig(model=str(tmp_path)))
    with pytest.raises(ModelError, match="would not be the same in RUN/model: beside a model of type qwen2"):
        check_saved_tokenizer(tokenizer, Qwen2Config())
    check_saved_tokenizer(tokenizer, LlamaConfig())


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    made = Tokenizer(models.BPE(vocab={"hello": 0, "world": 1, "<s>": 2}, merges=[]))
    with pytest.raises(ModelError, match=r"loses text: of 2 words of its own vocabulary 2 do not come back.*'hello'"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>"), "student.model")


def test_a_tokenizer_of_a_far_smaller_model_is_refused() -> None:
    tokenizer = load_tokenizer(TeacherConfig(model=str(BUNDLE / "stories260k")))
    check_size(tokenizer, 1024, "teacher.model")
    with pytest.raises(
        ModelError, match=r"^teacher\.model: its tokenizer names 512 tokens, and its embedding has 151936 rows"
    ):
        check_size(tokenizer, 151_936, "teacher.model")
