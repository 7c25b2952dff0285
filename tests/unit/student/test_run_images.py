"""A run on chat data with images, in one process: data prepared, both models shown the images, the student saved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.run_images import RunImages
from taid_ray.distributed.world import World
from taid_ray.driver import preflight
from taid_ray.errors import ConfigError, ModelError
from taid_ray.media.processor import MediaSettings, load_media_processor
from taid_ray.models.student_init import build_student
from tests.support.image_runs import image_keys, write_image_rows
from tests.support.store import prepare_here
from tests.support.students import SMALL_BUCKETS
from tests.support.tiny_vision import save_tiny

pytestmark = pytest.mark.usefixtures("one_process_group")


def config_of(directory: Path, teacher: Path, student: Path, **data: Any) -> DistillConfig:
    write_image_rows(directory)
    return build_config(
        {
            "teacher": {"model": str(teacher), "mode": "local", "dtype": "float32"},
            "student": {"model": str(student), "dtype": "float32", "zero_stage": 2, "deepspeed": SMALL_BUCKETS},
            "data": image_keys(directory) | {"sequence_length": 256, "valid_documents": 3} | data,
            "loss": {"name": "forward_kl"},
            "train": {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3},
            "out": str(directory / "run"),
        }
    )


def losses(config: DistillConfig) -> tuple[list[float], Any, Any]:
    """Runs all steps. Returns the loss of each, the student, and the worker's images."""
    from taid_ray.models.pair import media_of
    from taid_ray.student.engine import Student
    from taid_ray.student.engine_check import check_engine
    from taid_ray.student.pixels import BatchInputs
    from taid_ray.student.prefetch import Prefetcher
    from taid_ray.student.training_data import StoredSteps
    from taid_ray.student.worker import request_window
    from taid_ray.teacher.local import LocalTeacher

    spec, world, device = preflight.prepare(config), World(), torch.device("cpu")
    data = prepare_here(config)
    spec = preflight.with_data(config, spec, data)
    assert spec.media and spec.image_bytes > 0
    images = RunImages(media_of(config.student, spec.media))
    model = build_student(config, spec.vocabulary)
    student = Student(
        config, model, spec.vocabulary.num_shared, world, device, images=BatchInputs(images.processor, images.read)
    )
    check_engine(student, spec.vocabulary.student_rows)
    teacher = LocalTeacher(config.given_teacher, spec.vocabulary.num_shared, device, spec.media, images.read)
    student.teacher_head = teacher.head()
    steps = StoredSteps(config, data, spec.total_steps, world).steps(0, None)
    stream = Prefetcher(steps, teacher, *request_window(config), student.clock, student.prepare)
    found = []
    for step in range(1, spec.total_steps + 1):
        work, total = stream.next_step(), 0.0
        student.begin_step(step, spec.total_steps)
        for _ in work.batches:
            loss, _ = student.forward(*stream.collect(), 0.5)
            student.backward(loss / work.num_loss_tokens)
            total += loss.item()
        student.step(config.train.learning_rate)
        found.append(total / work.num_loss_tokens)
    return found, student, images


def test_teacher_and_student_see_the_same(tmp_path: Path) -> None:
    """A student that is its teacher has nothing to learn from any row, and another one has."""
    teacher = save_tiny("llava", tmp_path / "teacher")
    config = config_of(tmp_path, teacher, teacher, pack=False)
    assert losses(config)[0][0] == pytest.approx(0, abs=1e-7)  # later AdamW makes much of what is rounded

    from taid_ray.models.pair import run_tokenizer
    from taid_ray.student.worker import write_results

    other = save_tiny("llava", tmp_path / "student", seed=1)
    config = config.model_copy(update={"student": config.student.model_copy(update={"model": str(other)})})
    found, student, images = losses(config)
    assert found[0] > found[-1] > 0.01
    student.save(student.gathered_state(), config.run_dir / "model")
    write_results(config, {}, run_tokenizer(config), images.processor.processor)
    again = load_media_processor(str(config.run_dir / "model"), images.processor.settings, "student.model")
    assert again.identity() == images.processor.identity()


def test_what_cannot_be_trained_on_images_is_refused(tmp_path: Path) -> None:
    """A family that does not pack, models of text, and a config that names another token than the processor writes."""
    teacher = save_tiny("lfm2_vl", tmp_path / "teacher")
    config = config_of(tmp_path, teacher, teacher)
    with pytest.raises(
        ConfigError, match=r"data.pack: true: a student of type lfm2_vl lets documents .* set data.pack: false"
    ):
        preflight.prepare(config)
    preflight.prepare(config.model_copy(update={"data": config.data.model_copy(update={"pack": False})}))

    tree = json.loads((teacher / "config.json").read_text()) | {"image_token_id": 3}
    (teacher / "config.json").write_text(json.dumps(tree))
    with pytest.raises(
        ModelError, match=r"student.model: its processor writes the token 512 for images, where .* names 3, and"
    ):
        preflight.prepare(config)


def test_settings_are_those_of_the_driver(tmp_path: Path) -> None:
    teacher = save_tiny("internvl", tmp_path / "teacher")
    config = config_of(tmp_path, teacher, teacher, image_processor={"max_patches": 2})
    spec = preflight.prepare(config)
    assert spec.media is not None and spec.media.options == {"max_patches": 2}
    assert replace(spec.media, options={}) == MediaSettings(spec.media.backend)
