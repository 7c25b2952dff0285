"""The tests of `models.isolation` as the student is trained: in its engine, on its device, in its dtype, with long rows."""

from taid_ray.models.head import computes_one_row
from taid_ray.models.image_isolation import check_images
from taid_ray.models.isolation import check_probe
from taid_ray.models.probes import Probe, is_mixture, long_probe
from taid_ray.models.self_test import explained_tests
from taid_ray.student.engine import Student


def check_engine(student: Student, vocab_rows: int) -> None:
    """Checks that no position of the student sees what it must not see. Collective; changes nothing of the training.

    vocab_rows: of the whole head, which under ZeRO-3 does not know them. Rows are probed as long as data.sequence_length, up
    to probes.LONG_PROBE. Raises ModelError.
    """
    model, data = student.causal_lm, student.config.data
    probe = Probe(
        name=type(model).__name__,
        section="student",
        compute=student.hidden,
        vocab_rows=vocab_rows,
        everywhere=lambda holds: not any(student.world.sum([float(not holds)])),
        device=student.device,
        one_row=computes_one_row(model),
        mixture=is_mixture(model),
    )
    with explained_tests(model, "student.model", shared=True):
        check_probe(probe, data.pack, long_probe(student.device, data.sequence_length))
        if student.images is not None:
            check_images(probe, student.images.media, data.pack)
