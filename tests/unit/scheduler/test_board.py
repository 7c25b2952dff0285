"""The notice board of the scheduler actor, without Ray."""

from taid_ray.scheduler.board import Board


def test_a_reader_gets_what_it_has_not_seen() -> None:
    board = Board()
    assert board.notes_after(0) == []
    for note in ("one", "two", "three"):
        board.note(note)
    assert board.notes_after(0) == ["one", "two", "three"]
    assert board.notes_after(2) == ["three"]
    assert board.notes_after(3) == []


def test_notes_of_a_restarted_actor_follow_those_that_were_read() -> None:
    board = Board()  # its predecessor had five notes
    board.note("six")
    assert board.notes_after(5) == ["six"]
    board.note("seven")
    assert board.notes_after(6) == ["seven"]


def test_the_pool_is_unknown_until_the_driver_has_spoken() -> None:
    board = Board()
    assert not board.pool_known
    error = RuntimeError("no model")
    board.set_pool(error)
    assert board.pool_known and board.pool_error is error
    board.set_pool(None)
    assert board.pool_known and board.pool_error is None
