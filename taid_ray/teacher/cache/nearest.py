"""Why a sample is not in a file of teacher outputs: what the row that is most like it has instead."""

from collections.abc import Iterable

import numpy as np

from taid_ray.data.batch import Ints


def describe_nearest(rows: Iterable[tuple[Ints, Ints]], tokens: Ints, loss_positions: Ints) -> str:
    """Says in a sentence how the most similar row differs from a sample, and which keys may be the reason.

    rows: token ids and loss positions of each row of the file. tokens: those of the sample up to its last label.
    """
    best, nearest = 0, None
    for number, (found, where) in enumerate(rows, 1):
        alike = _common(found, tokens)
        if alike > best:
            best, nearest = alike, (number, found, where)
        if best == len(tokens):
            break
    if nearest is None:
        return f"no row of the file begins with its first token {tokens[0]}: see the tokenizer and data.chat_template"
    number, found, where = nearest
    if best == len(tokens):
        ends = f" of {len(found)}, so that it may have been cut elsewhere" if len(found) > len(tokens) else ""
        return (
            f"row {number} begins with the same {best} tokens{ends}, but has {len(where)} loss positions instead of "
            f"{len(loss_positions)}, or others: see data.loss_on, data.turns and data.sequence_length"
        )
    if best == len(found):
        return f"row {number} ends after the first {best} of its tokens: see data.sequence_length and data.overlong"
    return (
        f"row {number} is most like it: the first {best} tokens are the same, and then comes {found[best]} instead of "
        f"{tokens[best]}: see data.chat_template, data.date, the tokenizer, and the documents themselves"
    )


def _common(one: Ints, other: Ints) -> int:
    """Counts how many tokens at the beginning are the same."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
