"""Figures of answers, and the conversations that are answered."""

import pytest

from taid_ray.student.rouge import exact_match, rouge_l


def test_rouge_compares_with_the_response() -> None:
    response = "It was a sunny day."
    found = rouge_l([(response, response), (response, "Tom went to the park."), (response, "It was a day.")])
    assert found == [1, 0, pytest.approx(2 * 4 / (4 + 5))]  # four words in common, of four and of five


def test_an_exact_answer_may_differ_in_space_and_case() -> None:
    pairs = [
        ("Three cats.", " three CATS.\n"),
        ("Stra\u00dfe", "STRASSE"),
        ("three cats.", "three cats"),
        ("a b", "ab"),
    ]
    assert exact_match(pairs) == [1, 1, 0, 0]
