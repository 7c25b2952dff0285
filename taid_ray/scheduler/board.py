"""Notice board between the driver and the student workers: what the workers do, and whether the teacher pool is up.

It lives inside the scheduler actor and is lost with it. The driver counts the notes it has read, and says again every few
seconds how the pool stands, so that nothing depends on a restarted actor's memory.
"""


class Board:
    """Notes of the workers for the driver's terminal, and the driver's word about the teacher pool."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._first = 0
        self.pool_known = False
        """Whether the driver has said how the teacher pool stands."""
        self.pool_error: Exception | None = None
        """The reason why the pool could not be started."""

    def note(self, message: str) -> None:
        """Adds a worker's note."""
        self._notes.append(message)

    def notes_after(self, seen: int) -> list[str]:
        """New notes for a reader who has `seen` that many.

        A reader who has seen more than there are knew the actor before its restart: the notes here follow those.
        """
        if seen > self._first + len(self._notes):
            self._first = seen
        return self._notes[max(0, seen - self._first) :]

    def set_pool(self, error: Exception | None) -> None:
        """Records that the teacher pool is up (None), or why it is not."""
        self.pool_known, self.pool_error = True, error
