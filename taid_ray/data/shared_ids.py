"""The check that every token of the data is one which teacher and student share."""

from collections.abc import Iterable, Mapping

from taid_ray.data.batch import Row
from taid_ray.errors import DataError


def check_ids(rows: Iterable[Row], num_shared: int, tokens: Mapping[str, int] | None = None) -> None:
    """Raises DataError if an input (and so a target) id is not shared. `tokens` (token to id) gives the message its name."""
    for number, row in enumerate(rows, 1):
        worst = int(row.input_ids.max())
        if worst < num_shared:
            continue
        raise not_shared(f"row {number}", worst, num_shared, tokens)


def not_shared(where: str, token_id: int, num_shared: int, tokens: Mapping[str, int] | None = None) -> DataError:
    """Makes the error for an id that is not shared. where: what holds it. `tokens` as for `check_ids`."""
    names = [repr(token) for token, index in (tokens or {}).items() if index == token_id]
    return DataError(
        f"data: the token {' '.join([*names, f'with id {token_id}'])} in {where} is not known to both models: "
        f"they share the ids below {num_shared}. Set student.resize_to_teacher: true to give the student the "
        f"teacher's tokens, or keep this token out of the data (see data.chat_template)."
    )
