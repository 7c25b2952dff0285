"""Comparison of two vocabularies: whether an id means the same token in both, and how many ids they share.

Checkpoints pad their embedding to other sizes than the tokenizer has tokens (Qwen2.5-32B 152064 rows, 1.5B 151936,
real ids 151665), and tokenizers of one family differ in the tokens added at the end. A token-by-token loss needs both
heads cut to ids that mean the same.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from taid_ray.errors import ModelError

Added = tuple[Set[int], Set[int]]
"""Ids of special tokens, and of others that were added to a vocabulary, in the teacher's tokenizer and in the student's."""
NONE_ADDED: Added = (frozenset(), frozenset())


@dataclass(frozen=True)
class Vocabulary:
    """Result of comparing the vocabularies of teacher and student."""

    num_shared: int
    """Both heads are cut to rows [0, num_shared), and data may hold only these ids."""
    new_ids: tuple[int, ...]
    """Ids that only the teacher has, ascending. With `resize_to_teacher` they lie below num_shared, otherwise not."""
    unshared_ids: tuple[int, ...]
    """Ids below num_shared that not both tokenizers name, ascending: gaps, and with `resize_to_teacher` the new ids."""
    student_rows: int
    """Rows that the student's embedding and head need: more than they have only with `resize_to_teacher`."""
    renamed: tuple[tuple[int, str, str], ...] = ()
    """Added tokens whose id both have under different names, ascending: the id, the student's name, the teacher's name."""

    def known_ids(self) -> list[int]:
        """Lists the ids that both models have, ascending."""
        unshared = set(self.unshared_ids)
        return [index for index in range(self.num_shared) if index not in unshared]


def align(
    teacher_tokens: Mapping[str, int],
    student_tokens: Mapping[str, int],
    teacher_rows: int,
    student_rows: int,
    resize_to_teacher: bool,
    added: Added = NONE_ADDED,
) -> Vocabulary:
    """Compares two token-to-id maps (`tokenizer.get_vocab()`); `*_rows` are the rows of the models' heads.

    An id counts as real if its tokenizer names it and its model has a row for it. One map may have ids that the other
    lacks, above all shared ones. Ids that neither names but that lie between shared ones stay in (no text holds them).
    With `resize_to_teacher` the student takes the teacher's tokenizer: every real id of the teacher is shared, wherever
    the student lacks it, and an added token may have another name, or another id, in the student's tokenizer.

    Raises ModelError if a token has two ids, an id two tokens, or an id of one map only lies among the shared ones.
    """
    teacher = {index: token for token, index in teacher_tokens.items() if index < teacher_rows}
    student = {index: token for token, index in student_tokens.items() if index < student_rows}
    shared = teacher.keys() & student.keys()
    _refuse_conflicts(teacher, student, resize_to_teacher, added)
    if not shared:
        raise ModelError("teacher and student share no token ids. Choose a student of the teacher's family.")
    num_shared = 1 + (max(teacher) if resize_to_teacher else max(shared))
    if not resize_to_teacher:
        _refuse_holes(teacher, student, num_shared)
    return Vocabulary(
        num_shared,
        tuple(sorted(teacher.keys() - shared)),
        tuple(index for index in range(num_shared) if index not in shared),
        max(student_rows, num_shared),
        tuple((index, student[index], teacher[index]) for index in sorted(shared) if student[index] != teacher[index]),
    )


def _refuse_conflicts(teacher: Mapping[int, str], student: Mapping[int, str], resize: bool, added: Added) -> None:
    ids = {token: index for index, token in student.items()}
    renamed = {index for index in teacher.keys() & student.keys() if teacher[index] != student[index]}
    moved = {index for index, token in teacher.items() if ids.get(token, index) != index}
    of_teacher, of_student = added
    ordinary = {i for i in renamed if i not in of_teacher or i not in of_student}
    ordinary |= {i for i in moved if i not in of_teacher or ids[teacher[i]] not in of_student}
    wrong = ordinary if resize else renamed | moved
    if not wrong:
        return
    remedy = "Choose a student with the teacher's tokenizer."
    if not ordinary:
        remedy = "Set student.resize_to_teacher: true to give the student the teacher's names of these special tokens."
    raise ModelError(
        f"the tokenizers of teacher and student disagree on {len(wrong)} of {len(teacher.keys() | student.keys())} "
        f"ids, for example {_examples(wrong, teacher, student)}. {remedy}"
    )


def _refuse_holes(teacher: Mapping[int, str], student: Mapping[int, str], num_shared: int) -> None:
    holes = {index for index in teacher.keys() ^ student.keys() if index < num_shared}
    if holes:
        missing_here = teacher.keys() & holes
        remedy = "Set student.resize_to_teacher: true to give the student the teacher's tokens."
        raise ModelError(
            f"{len(holes)} ids below the last shared one ({num_shared - 1}) exist in one tokenizer only "
            f"({len(missing_here)} only in the teacher's), for example {_examples(holes, teacher, student)}. {remedy}"
        )


def _examples(ids: Iterable[int], teacher: Mapping[int, str], student: Mapping[int, str]) -> str:
    def name(tokens: Mapping[int, str], index: int) -> str:
        return repr(tokens[index]) if index in tokens else "none"

    return "; ".join(f"id {i}: teacher {name(teacher, i)}, student {name(student, i)}" for i in sorted(ids)[:3])
