"""What a person is shown of a sample is its whole text, divided where the loss begins and ends."""

import pytest
from transformers import AutoTokenizer

from taid_ray.data.packing import Sample
from taid_ray.data.preview import Part, preview
from tests.support.paths import BUNDLE

TOKENIZER = AutoTokenizer.from_pretrained(BUNDLE / "stories260k")


def sample(text: str, loss_from: int, loss_to: int) -> Sample:
    ids = TOKENIZER(text)["input_ids"]
    return Sample(ids, [loss_from <= i < loss_to for i in range(len(ids))], 7)


@pytest.mark.parametrize("bounds", [(0, 99), (3, 5), (1, 4), (5, 5), (0, 1)])
def test_the_parts_are_the_whole_text_in_order(bounds: tuple[int, int]) -> None:
    found = sample("Once upon a time, there was a café.", *bounds)
    shown = preview(found, TOKENIZER)
    assert shown.to_dict()["text"] == TOKENIZER.decode(found.input_ids)
    assert (shown.row, shown.tokens) == (7, len(found.input_ids))
    assert shown.loss_tokens == found.num_loss_tokens == sum(found.loss_mask[1:])
    assert [part.has_loss for part in shown.parts[1:]] == [not part.has_loss for part in shown.parts[:-1]]


def test_the_space_before_a_word_stays_with_it() -> None:
    ids = TOKENIZER("a big day")["input_ids"]
    big = TOKENIZER.convert_tokens_to_ids("▁big")
    assert ids.count(big) == 1
    shown = preview(Sample(ids, [index == big for index in ids]), TOKENIZER)
    assert [part.text for part in shown.parts] == ["<s> a", " big", " day"]
    assert shown.to_dict()["loss_text"] == [" big"]


def test_the_first_token_is_never_predicted() -> None:
    shown = preview(sample("a dog", 0, 99), TOKENIZER)
    assert shown.parts[0] == Part("<s>", False)


def test_a_character_that_the_loss_cuts_in_two_does_not_lose_the_rest() -> None:
    ids = TOKENIZER("x日y", add_special_tokens=False)["input_ids"]  # the character takes three tokens of a byte each
    bytes_of_it = [i for i, token in enumerate(TOKENIZER.convert_ids_to_tokens(ids)) if token.startswith("<0x")]
    assert len(bytes_of_it) == 3
    mask = [i > bytes_of_it[0] for i in range(len(ids))]
    shown = preview(Sample(ids, mask), TOKENIZER)
    assert shown.parts[-1].has_loss and shown.parts[-1].text.endswith("y") and shown.loss_tokens == 3
