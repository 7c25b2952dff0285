"""The student in a DeepSpeed engine, one process: every ZeRO stage follows the plain reference, whatever the head is."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from taid_ray.cli.quickstart import quickstart_config
from taid_ray.config.objective import WITHOUT_TOPK, LossName
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.batch import NO_LABEL, Row, collate
from taid_ray.data.cursor import Cursor
from taid_ray.driver.preflight import prepare
from taid_ray.errors import AttemptError, ModelError, NonFiniteLossError
from taid_ray.losses.projection import LogitTransform
from taid_ray.models.head import Head, hidden_states
from taid_ray.run.metrics import StepMetrics
from taid_ray.scheduler.aggregate import GO_ON, LossAggregator, LossSums, StepResult
from taid_ray.scheduler.schedule import TAIDSchedule
from taid_ray.student import engine
from taid_ray.student.engine_check import check_engine
from taid_ray.teacher.payload import TeacherOutput, needs_head
from tests.support.paths import BUNDLE
from tests.support.reference import reference_run
from tests.support.store import prepare_here
from tests.support.students import TIED, config_for

pytestmark = pytest.mark.usefixtures("one_process_group")

UNTIED: dict[str, Any] = {"init": "scratch", "architecture": {"tie_word_embeddings": False, "num_hidden_layers": 2}}
LORA_HEAD: dict[str, Any] = {"rank": 4, "target_modules": ["lm_head", "q_proj"]}


class LocalScheduler:
    """What the scheduler actor does, for one rank in the same process."""

    def __init__(self, config: DistillConfig, total_steps: int):
        self.aggregator = LossAggregator(TAIDSchedule(config.effective_schedule, total_steps), config.schedule.signal)
        self.aggregator.begin(1, 1, None)
        self.answer: StepResult | None = None

    def submit(self, step: int, sums: LossSums) -> None:
        self.answer = self.aggregator.report(1, step, 0, sums)

    def collect(self, step: int) -> StepResult:
        assert self.answer is not None and self.answer.step == step
        return self.answer


class StepLines:
    """Hooks that want nothing, and keep each step's metrics."""

    def __init__(self) -> None:
        self.metrics: list[StepMetrics] = []

    def request(self, step: int) -> int:
        return GO_ON

    def after_step(self, metrics: StepMetrics, result: StepResult, cursor: Cursor) -> None:
        self.metrics.append(metrics)


def train(config: DistillConfig, checked: bool = False) -> tuple[list[StepMetrics], Any]:
    """Runs the product's loop in this process. Returns its metrics and the student. checked: its engine, before."""
    from taid_ray.distributed.world import World
    from taid_ray.models.student_init import build_student
    from taid_ray.student.engine import Student
    from taid_ray.student.loop import train_loop
    from taid_ray.student.prefetch import Prefetcher
    from taid_ray.student.training_data import StoredSteps
    from taid_ray.student.worker import request_window
    from taid_ray.teacher.local import LocalTeacher

    spec, world, device = prepare(config), World(), torch.device("cpu")
    student = Student(config, build_student(config, spec.vocabulary), spec.vocabulary.num_shared, world, device)
    if checked:
        check_engine(student, spec.vocabulary.student_rows)
    teacher = LocalTeacher(config.teacher, spec.vocabulary.num_shared, device) if config.teacher else None
    scheduler = LocalScheduler(config, spec.total_steps)
    batches = StoredSteps(config, prepare_here(config), spec.total_steps, world).steps(0, None)
    lines = StepLines()
    start = scheduler.aggregator.result
    stream = Prefetcher(batches, teacher, *request_window(config), student.clock)
    if teacher and needs_head(config.teacher.payload):
        student.teacher_head = teacher.head()
    train_loop(student, scheduler, stream, lines, start, spec.total_steps)
    return lines.metrics, student


def assert_follows(lines: list[StepMetrics], expected: list[dict[str, float]]) -> None:
    for line, reference in zip(lines, expected, strict=True):
        for key in {"t", "loss", "kl"} & reference.keys():
            assert getattr(line, key) == pytest.approx(reference[key], rel=1e-6, abs=1e-5), (line.step, key)
        assert line.grad_norm == pytest.approx(reference["grad_norm"], rel=1e-4), line.step


@pytest.fixture(scope="module")
def expected() -> dict[str, list[dict[str, float]]]:
    return {
        "tied": reference_run(config_for(TIED)),
        "untied": reference_run(config_for(UNTIED)),
        "no clipping": reference_run(config_for(TIED, max_grad_norm=0.0)),
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_every_stage_follows_the_reference(head: str, stage: int, expected: dict[str, Any]) -> None:
    lines, _ = train(config_for((TIED if head == "tied" else UNTIED) | {"zero_stage": stage}))
    assert_follows(lines, expected[head])


@pytest.mark.parametrize("stage", [0, 3])
def test_sft_without_a_teacher_follows_the_reference(stage: int) -> None:
    tree = config_for(UNTIED | {"zero_stage": stage, "model": str(BUNDLE / "stories260k")}).model_dump(mode="json")
    config = build_config(tree | {"teacher": None, "loss": {"name": "sft"}})
    lines, _ = train(config)
    assert_follows(lines, reference_run(config))
    assert lines[0].loss != lines[-1].loss


# Every ZeRO stage, and most accumulate two micro-batches.
OTHER_LOSSES: dict[str, tuple[int, dict[str, Any]]] = {
    "taid_reverse_kl": (1, {}),
    "adaptive_kl": (0, {"mu": 0.6}),
    "dkd": (2, {"beta": 2.0}),
    "gkd": (3, {"beta": 0.3, "temperature": 2.0}),
    "ctkd": (0, {"ctkd": {"learning_rate": 0.5, "ramp": 0.5}}),
    "published dkd": (1, {"published": True}),
}


@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, stage) for name, (stage, _) in OTHER_LOSSES.items()] + [("ctkd", stage) for stage in (1, 2, 3)],
)
def test_other_losses_follow_the_reference(name: str, stage: int) -> None:
    tree = config_for(TIED | {"zero_stage": stage}).model_dump()
    tree["loss"] |= {"name": name.removeprefix("published "), **OTHER_LOSSES[name][1]}
    config = build_config(tree)
    lines, _ = train(config)
    expected = reference_run(config)
    assert_follows(lines, expected)
    assert [line.temperature for line in lines] == pytest.approx([line["temperature"] for line in expected], rel=1e-5)
    if name == "ctkd":
        assert abs(lines[-1].temperature - lines[0].temperature) > 1


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_the_check_of_the_engine_changes_no_bit(stage: int, dtype: str) -> None:
    config = config_for(TIED | {"zero_stage": stage, "dtype": dtype}, steps=2)
    plain, checked = (
        [(line.loss, line.kl, line.grad_norm) for line in train(config, each)[0]] for each in (False, True)
    )
    assert plain == checked


@pytest.mark.parametrize("stage", [1, 3])
def test_a_student_that_mixes_documents_in_its_engine_is_refused(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where the leak is much smaller than what is rounded in a model's own logits."""

    def leaking(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = hidden_states(model, inputs)
        return hidden + 1e-3 * torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)

    monkeypatch.setattr(engine, "hidden_states", leaking)
    with pytest.raises(ModelError, match=r"^student\.model: .* see each other .* data\.pack: false"):
        train(config_for(TIED | {"zero_stage": stage, "dtype": "bfloat16"}), checked=True)


@pytest.mark.parametrize("stage", [0, 2])
def test_max_grad_norm_0_does_not_clip(stage: int, expected: dict[str, Any]) -> None:
    lines, _ = train(config_for(TIED | {"zero_stage": stage}, max_grad_norm=0.0))
    assert_follows(lines, expected["no clipping"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_raw_deepspeed_configuration_reaches_the_engine(stage: int, expected: dict[str, Any]) -> None:
    """Optimizer state offloaded to the CPU changes where it lies and nothing else."""
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    lines, student = train(config_for(TIED | {"zero_stage": stage, "deepspeed": offload}))
    assert_follows(lines, expected["tied"])
    assert student.engine.zero_offload_optimizer().device == "cpu"


@pytest.mark.parametrize("stage", [1, 3])
def test_gradient_checkpointing_changes_nothing(stage: int, expected: dict[str, Any]) -> None:
    lines, _ = train(config_for(TIED | {"zero_stage": stage, "gradient_checkpointing": True}))
    assert_follows(lines, expected["tied"])


@pytest.mark.parametrize("lora", [{"rank": 4}, LORA_HEAD], ids=["body", "head"])
def test_lora_is_the_same_under_every_stage_and_merges(lora: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from taid_ray.models.student_init import build_student

    logits, histories = [], []
    for stage in (0, 2, 3):
        lines, student = train(config_for(UNTIED | {"zero_stage": stage, "lora": lora}))
        histories.append([(line.loss, line.grad_norm) for line in lines])
        trainable = [name for name, p in student.trained.named_parameters() if p.requires_grad]
        assert trainable and all("lora_" in name for name in trainable)
        student.save(student.gathered_state(), tmp_path / str(stage))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(stage))
        assert not any("lora" in name for name, _ in merged.named_parameters())
        logits.append(merged(torch.arange(20)[None]).logits)
    for history, each in zip(histories[1:], logits[1:], strict=True):
        assert history == [pytest.approx(step, rel=1e-4) for step in histories[0]]
        torch.testing.assert_close(each, logits[0], rtol=1e-3, atol=1e-5)
    untrained = build_student(config_for(UNTIED), None)
    assert not torch.allclose(untrained(torch.arange(20)[None]).logits, logits[0], atol=1e-4)


def test_an_adapter_on_a_tied_head_is_refused() -> None:
    with pytest.raises(ModelError, match="leave lm_head out"):
        train(config_for(TIED | {"zero_stage": 0, "lora": LORA_HEAD}))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_stays_near_the_reference(stage: int, expected: dict[str, Any]) -> None:
    lines, _ = train(config_for(TIED | {"zero_stage": stage, "dtype": "bfloat16"}))
    for line, reference in zip(lines, expected["tied"], strict=True):
        assert line.loss == pytest.approx(reference["loss"], rel=5e-3), line.step


@pytest.mark.more
@pytest.mark.timeout(240)
def test_quantised_payloads_stay_near_the_exact_run() -> None:
    """The beginning of the quickstart: t within 1e-3 and the loss within 1 % at every step."""
    runs = {}
    for payload in ("hidden", "hidden_int8", "hidden_fp8"):
        config = quickstart_config(["teacher.mode=local", f"teacher.payload={payload}", "train.steps=25"], "unused")
        runs[payload], _ = train(config)
    exact = runs.pop("hidden")
    for payload, lines in runs.items():
        for line, expected in zip(lines, exact, strict=True):
            assert line.t == pytest.approx(expected.t, abs=1e-3), (payload, line.step)
            assert line.loss == pytest.approx(expected.loss, rel=1e-2), (payload, line.step)
        assert [line.loss for line in lines] != [line.loss for line in exact]  # the payload did reach the loss


@pytest.mark.parametrize("head", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_step_is_accounted_for(head: dict[str, Any]) -> None:
    lines, _ = train(config_for(head))
    for line in lines[1:]:
        phases = (line.data_s, line.teacher_wait_s, line.forward_s, line.loss_s, line.backward_s, line.optimizer_s)
        assert all(seconds > 0 for seconds in phases)
        assert 0.9 * line.step_s <= sum(phases) + line.schedule_wait_s <= 1.01 * line.step_s
        # A local teacher computes while the student waits, and at no other time.
        assert 0 < line.teacher_compute_s <= line.teacher_wait_s


@pytest.mark.parametrize("name", [name for name in get_args(LossName) if name not in WITHOUT_TOPK])
def test_training_on_the_top_k_alone(name: str) -> None:
    """Under ZeRO-3 and without the teacher's head the run follows the exact one where the top k leave little out."""
    found = {}
    for payload in ("hidden", "topk"):
        config = config_for(TIED | {"zero_stage": 3}, steps=8)
        tree = config.model_dump()
        tree["teacher"] |= {"payload": payload, "topk": 256}
        tree["loss"]["name"] = name
        found[payload], _ = train(build_config(tree))
    for exact, line in zip(found["hidden"], found["topk"], strict=True):
        assert line.kl == pytest.approx(exact.kl, rel=0.02), line.step
        assert line.loss == pytest.approx(exact.loss, rel=0.02), line.step
        assert line.grad_norm == pytest.approx(exact.grad_norm, rel=0.05), line.step
    assert len({line.kl for line in found["topk"]}) == 8


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_saved_model_is_the_trained_one(stage: int, tmp_path: Path) -> None:
    """The saved weights reproduce the training model's own next loss, and load with plain transformers."""
    from transformers import AutoModelForCausalLM

    from taid_ray.models.student_init import build_student

    _, student = train(config_for(TIED | {"zero_stage": stage}))
    student.save(student.gathered_state(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    state = student.gathered_state()
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.data, state[name], rtol=0, atol=0)
    before = dict(build_student(config_for(TIED), None).named_parameters())
    assert any(not torch.equal(parameter, before[name]) for name, parameter in loaded.named_parameters())


def test_a_mixture_of_experts_is_reloaded_as_it_was_trained(tmp_path: Path) -> None:
    """The bias of its router stays in float32 when the model is loaded in bfloat16, and so in training and in the saved file."""
    import transformers as hf

    from taid_ray.models.loading import load_tokenizer

    sizes = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "v_head_dim": 8,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    torch.manual_seed(0)
    model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **heads, **ranks, **experts, initializer_range=0.2))
    model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").uniform_(5.0, 5.01)
    model.save_pretrained(tmp_path / "model")
    config = config_for({"model": str(tmp_path / "model"), "dtype": "bfloat16", "zero_stage": 3}, steps=2)
    load_tokenizer(config.teacher).save_pretrained(tmp_path / "model")

    _, student = train(config)
    inputs = {"input_ids": torch.arange(40).view(2, 20), "position_ids": torch.arange(20).expand(2, 20)}
    student.engine.eval()
    with torch.no_grad():
        trained = student.engine(inputs, torch.arange(40), lambda hidden, weight, bias: hidden @ weight.T)
    student.save(student.gathered_state(), tmp_path / "saved")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert loaded.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").unique().numel() == 4
    with torch.no_grad():
        assert torch.equal(loaded(**inputs, use_cache=False).logits.flatten(0, 1), trained)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_stops_the_run(stage: int) -> None:
    """DeepSpeed would drop the step and go on (ZeRO 1 to 3), or write NaN weights (ZeRO 0)."""
    from taid_ray.distributed.world import World
    from taid_ray.models.student_init import build_student
    from taid_ray.student.engine import Student

    config = config_for(TIED | {"zero_stage": stage})
    device = torch.device("cpu")
    student = Student(config, build_student(config, None), 512, World(), device)
    batch = collate([Row([1, 2, 3], [0, 1, 2], [2, 3, NO_LABEL])])
    student.teacher_head = Head(torch.randn(512, 64), None, LogitTransform())
    loss, _ = student.forward(batch, TeacherOutput("hidden", {"hidden": torch.randn(2, 64)}), 0.5)
    student.backward(loss * float("inf"))
    before = {name: tensor.clone() for name, tensor in student.gathered_state().items()}
    with pytest.raises(NonFiniteLossError, match="gradient norm"):
        student.step(1e-3)
    for name, tensor in student.gathered_state().items():
        assert torch.equal(tensor, before[name]), name


def test_ranks_that_read_other_data_are_noticed(one_process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler actor sums up what all ranks counted; each rank knows what the global batch holds."""
    collect = LocalScheduler.collect
    monkeypatch.setattr(
        LocalScheduler,
        "collect",
        lambda self, step: replace(collect(self, step), tokens=collect(self, step).tokens + 1),
    )
    with pytest.raises(AttemptError, match=r"step 1: the ranks did not read the same global batch"):
        train(config_for(TIED))
