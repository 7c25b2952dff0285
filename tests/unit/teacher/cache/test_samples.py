import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_ray.data.batch import Batch, collate
from taid_ray.data.packing import Sample, to_rows
from taid_ray.teacher.cache.samples import batch_of_samples, join, samples_of, split

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
