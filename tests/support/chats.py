"""What becomes of conversations: a small tokenizer with the special tokens of many families, and the text that carries loss."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taid_ray.config.data import DataSource
from taid_ray.data.encoding import Encoder
from taid_ray.data.preview import preview

NAMES = "im_start im_end user assistant observation end endoftext eot turn return call channel message start"
SPECIAL = ["<s>", "</s>", *(f"<|{name}|>" for name in NAMES.split(" "))]


def chat_tokenizer(template: Any = None, eos: str = "</s>", plain: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer. plain: tokens that are added, but not special."""
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(alphabet, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([token for token in SPECIAL if token not in plain])
    model.add_tokens(list(plain))
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token=eos, chat_template=template)


def encoder_of(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Encoder:
    """An encoder of `format: chat`, unless `settings` of the section data say otherwise."""
    config = DataSource(train="x", **{"format": "chat", "sequence_length": 4096} | settings)
    return Encoder(config, tokenizer, "data.train: x")


def encoded(encoder: Encoder, tokenizer: PreTrainedTokenizerFast, messages: Any, **columns: Any) -> list[str]:
    """The samples of one row as text, with ⟦⟧ around what carries loss."""
    row = {"messages": messages, "tools": None, "system": None} | columns
    samples = encoder.encode({name: [value] for name, value in row.items()}, 1)
    shown = [preview(sample, tokenizer) for sample in samples]
    return ["".join(f"⟦{part.text}⟧" if part.has_loss else part.text for part in each.parts) for each in shown]


def trained(template: str, messages: Any, tokenizer: Any = None, tools: Any = None, **settings: Any) -> list[str]:
    """The same, with a new encoder."""
    tokenizer = tokenizer or chat_tokenizer()
    return encoded(encoder_of(tokenizer, chat_template=template, **settings), tokenizer, messages, tools=tools)
