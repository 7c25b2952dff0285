import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_ray.data.batch import Batch, collate
from taid_ray.data.packing import Sample, to_rows
from taid_ray.media.refs import ImageRef
from taid_ray.teacher.cache.samples import batch_of_samples, join, samples_of, split, topk_key

TEACHER = "f" * 64


def documents(count: int, seed: int = 0, longest: int = 12) -> list[Sample]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        length = draw.randint(2, longest)
        mask = [draw.random() < 0.6 for _ in range(length)]
        found.append(Sample([draw.randint(1, 40) for _ in range(length)], mask, number + 1))
    return found


def batch(samples: list[Sample], length: int = 24, pack: bool = True) -> Batch:
    return collate(to_rows(samples, length, pack))


def keys(made: Batch, fingerprint: str = TEACHER, with_labels: bool = False) -> list[str]:
    return [sample.key for sample in samples_of(made, fingerprint, with_labels)]


def one(ids: list[int], loss: list[int], **changes: Any) -> str:
    """Key of one sample with these ids, of which those at `loss` are to be predicted."""
    (key,) = keys(batch([Sample(ids, [i in loss for i in range(len(ids))])], 64, **changes))
    return key


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_a_sample_has_the_same_key_in_any_batch(count: int, seed: int) -> None:
    samples = documents(count, seed)
    alone = sorted(key for sample in samples for key in keys(batch([sample])))
    assert sorted(keys(batch(samples))) == alone
    assert sorted(keys(batch(samples, 60))) == alone
    assert sorted(keys(batch(samples[::-1], pack=False))) == alone
    assert len(alone) == sum(sample.num_loss_tokens > 0 for sample in samples)


def test_keys_differ_by_what_the_answer_depends_on() -> None:
    base = one([5, 6, 7, 8], [1, 2])
    assert one([5, 6, 7, 8], [1, 2]) == base
    assert (
        one([5, 6, 7, 9], [1, 2]) == one([5, 6, 7, 9, 4], [1, 2]) == base
    )  # nothing behind the last loss position counts
    different = [
        one([5, 9, 7, 8], [1, 2]),
        one([5, 6, 7, 8], [2]),
        one([5, 6, 7, 8], [1, 2, 3]),
        one([6, 6, 7, 8], [1, 2]),
    ]
    assert len({base, *different}) == 5


def test_labels_count_only_where_the_answer_holds_them() -> None:
    first, second = (batch([Sample(ids, [False, True, True])]) for ids in ([5, 6, 7], [5, 6, 8]))
    assert keys(first) == keys(second)  # the last label is no input
    assert keys(first, with_labels=True) != keys(second, with_labels=True)
    assert keys(first) != keys(first, fingerprint="e" * 64)


def test_positions_count() -> None:
    made = batch([Sample([5, 6, 7], [False, True, True])])
    moved = replace(made, inputs=made.inputs | {"position_ids": made.inputs["position_ids"] + 3})
    assert keys(made) != keys(moved)


def test_an_input_that_no_key_covers_is_refused() -> None:
    made = batch(documents(2))
    with pytest.raises(AssertionError, match="cover"):
        samples_of(replace(made, inputs=made.inputs | {"pixels": torch.zeros(2)}), TEACHER, False)


def test_keys_of_text_are_those_of_the_first_version() -> None:
    """Made by the code before there were images: with others, what existing caches hold would be lost."""
    made = batch([Sample([5, 6, 7, 8], [False, True, True, False]), Sample([9, 10, 11], [False, False, True])], 16)
    assert keys(made) == [
        "2dc4348bdeb5ab2c7fe539ba20a09928843307216960075ac35efff4790ae0c2",
        "9d4ac5165abf3384e620d936c57154d15be9e2b0a9989086c7df564348011c32",
    ]
    labelled = [
        "ed69c95098931c783528d1731241822c26903db39fc7186f21de8341d052bea4",
        "e7777c7e6da2504340e4aa32a0816f7101676e33df7971675fdab3cb7a0970a9",
    ]
    assert keys(made, with_labels=True) == labelled
    assert topk_key(TEACHER, np.array([5, 6, 7, 8]), np.array([0, 1])) == labelled[0]


def image(start: int, name: str = "a", tokens: int = 3, width: int = 64, place: str = "memory:") -> ImageRef:
    return ImageRef(name * 32, start, tokens, width, 48, place)


SEEN = Sample(
    [5, 50, 50, 50, 6, 7, 50, 50, 50, 8], [False] * 5 + [True] + [False] * 4, images=(image(1), image(6, "b"))
)
"""Its only loss position, the 5th, is in front of the second image."""


def key_of(sample: Sample) -> str:
    (key,) = keys(batch([sample]))
    return key


def test_keys_cover_the_images_up_to_the_last_loss_position() -> None:
    first, second = SEEN.images
    base = key_of(SEEN)
    assert key_of(replace(SEEN, images=(first, replace(second, digest="c" * 32)))) == base
    assert key_of(replace(SEEN, images=(replace(first, place="file:elsewhere.png"),))) == base
    others = [(), (image(1, "c"),), (image(1, width=65),), (image(0),), (image(1, tokens=2),)]
    assert len({base, *(key_of(replace(SEEN, images=images)) for images in others)}) == 6


def test_an_image_may_end_with_a_loss_position_but_not_hold_one() -> None:
    ids = [5, 50, 50, 50, 6]
    ends = samples_of(batch([Sample(ids, [False] * 4 + [True], images=(image(1),))]), TEACHER, False)
    assert ends[0].row.images == (image(1),)
    with pytest.raises(AssertionError):
        samples_of(batch([Sample(ids, [False] * 3 + [True, False], images=(image(1),))]), TEACHER, False)


def test_images_move_with_their_samples() -> None:
    text = Sample([9, 10, 11, 12], [False, True, True, True])
    other = Sample([50, 50, 7], [False, False, True], images=(image(0, "d", tokens=2),))
    for made in (batch([text, SEEN, other], 32), batch([text, SEEN, other], 32, pack=False)):
        found = {sample.row.images: sample for sample in samples_of(made, TEACHER, False)}
        assert found.keys() == {(), (image(1),), (image(0, "d", tokens=2),)}
        joined, order = batch_of_samples([found[image(1),], found[()], found[image(0, "d", tokens=2),]], 32, pack=True)
        assert [sample.key for sample in order] == keys(joined)
        (row,) = joined.inputs["input_ids"].tolist()
        assert all(row[seen.start : seen.start + seen.tokens] == [50] * seen.tokens for seen in joined.images[0])
        assert sorted(seen.digest[0] for seen in joined.images[0]) == ["a", "d"]


def test_a_batch_without_loss_has_no_samples() -> None:
    assert samples_of(collate([]), TEACHER, False) == []


def scores(made: Batch) -> dict[str, torch.Tensor]:
    """A causal answer: at each loss position the sum of its sample's ids so far, and the label."""
    ids, positions = made.inputs["input_ids"], made.inputs["position_ids"]
    total = torch.zeros_like(ids)
    for row in range(len(ids)):
        running = 0
        for i in range(ids.shape[1]):
            running = int(ids[row, i]) + (running if positions[row, i] else 0)
            total[row, i] = running
    found = total.flatten()[made.loss_positions]
    return {"hidden": torch.stack([found, made.labels], 1).float(), "scale": found.float()}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000), st.booleans(), st.randoms(use_true_random=False))
def test_answers_to_parts_of_a_batch_make_the_answer_to_all_of_it(
    count: int, seed: int, pack: bool, draw: random.Random
) -> None:
    whole = batch(documents(count, seed))
    samples = samples_of(whole, TEACHER, True)
    if not samples:
        return
    found: dict[str, Any] = {}
    for part in (samples[::2], samples[1::2]):
        if part:
            draw.shuffle(part)
            made, order = batch_of_samples(part, 24, pack)
            assert keys(made, with_labels=True) == [sample.key for sample in order]
            assert made.inputs["input_ids"].shape[1] <= 24
            found |= split(scores(made), order)
    joined = join(samples, found)
    assert joined.keys() == {"hidden", "scale"}
    assert all(torch.equal(joined[name], tensor) for name, tensor in scores(whole).items())


def test_every_payload_dtype_can_be_cut_and_joined() -> None:
    whole = batch(documents(4))
    samples, n = samples_of(whole, TEACHER, False), whole.num_loss_tokens
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.int32, torch.bfloat16, torch.float16, torch.float32):
        tensors = {"x": torch.arange(n * 3).view(n, 3).float().to(dtype), "y": torch.arange(n).float()}
        joined = join(samples, split(tensors, samples))
        assert all(torch.equal(joined[k].view(torch.uint8), tensors[k].view(torch.uint8)) for k in tensors)
