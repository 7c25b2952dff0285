"""What a user can get wrong, through the command line: one message on stderr, exit code 2, and nothing left behind."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import ray
import yaml
from huggingface_hub import constants

from taid_ray.cli import app as cli
from taid_ray.cli import quickstart as example
from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import build_config
from taid_ray.driver import launch
from taid_ray.models import hub
from taid_ray.run.directory import write_config
from tests.support.paths import ROOT

BUNDLE = ROOT / "taid_ray" / "quickstart"
STORIES = BUNDLE / "stories260k"
CONFIG: dict[str, Any] = {
    "teacher": {"model": str(STORIES)},
    "student": {"init": "cut", "layers": [0, 4], "dtype": "float32"},
    "data": {
        "train": str(BUNDLE / "tinystories_train.jsonl"),
        "valid": str(BUNDLE / "tinystories_valid.jsonl"),
        "valid_documents": 4,
        "sequence_length": 64,
        "block_documents": 16,
    },
    "train": {"steps": 2, "batch_size": 2},
}
CHAT = ["data.train=BAD/chat.jsonl", "data.valid=null", "data.valid_documents=2", "data.format=chat"]
PAIRS = ["data.train=BAD/pairs.jsonl", "data.valid=null", "data.valid_documents=2", "data.format=prompt_response"]
TEMPLATE = "data.chat_template={% for m in messages %}{{ m.content }}{% endfor %}"
PRETRAINED = ["student.init=pretrained", "student.layers=null"]
SCRATCH = ["student.init=scratch", "student.layers=null"]

# Arguments after `train CONFIG` (BAD stands for the directory of `bad`), and what the message has to hold.
CASES: dict[str, tuple[list[str], list[str]]] = {
    # the command line and the configuration
    "unknown key": (["schedule.t_strat=0.3"], ["schedule.t_strat", "unknown key", "0.3", "schedule.t_start?"]),
    "unknown section": (["schedul.t_start=0.3"], ["schedul: unknown key", "Did you mean schedule?"]),
    "wrong type": (["train.steps=many"], ["train.steps: must be a whole number", "'many'"]),
    "section as value": (["teacher=3"], ["teacher: must be a section", "3"]),
    "t_start above t_end": (["schedule.t_start=0.9", "schedule.t_end=0.5"], ["schedule.t_start = 0.9", "0.5", "lower"]),
    "alpha out of range": (["schedule.alpha=1.5"], ["schedule.alpha", "less than or equal to 1", "1.5"]),
    "beta out of range": (["schedule.beta=-0.1"], ["schedule.beta", "greater than or equal to 0", "-0.1"]),
    "override without value": (["train.steps"], ["'train.steps'", "key=value", "schedule.t_start=0.3"]),
    "override without key": (["=3"], ["'=3'", "key=value"]),
    "override with empty part": (["train..steps=3"], ["'train..steps=3'", "key=value"]),
    "key twice": (["train={steps: 1, steps: 2}"], ["train: ", "the key 'steps' is given twice"]),
    "revision of no model": (["student.revision=v1"], ["student.revision is 'v1'", "teacher.revision"]),
    "DeepSpeed section as value": (["student.deepspeed={zero_optimization: 3}"], ["student.deepspeed", "must be a mapping"]),
    "override not YAML": (["train.steps=[1"], ["train.steps", "'[1'", "not valid YAML", "double quotes"]),
    # the run directory
    "out is empty": (["--out", ""], ["out: must not be empty"]),
    "out is remote": (["--out", "s3://bucket/run"], ["out: remote storage is not offered yet", "s3://bucket/run"]),
    "out is a file": (["--out", "BAD/file"], ["out: ", "file is a file", "directory"]),
    "out below a file": (["--out", "BAD/file/run"], ["out: ", "file/run cannot be made", "--out"]),
    "out not writable": (["--out", "/proc/run"], ["out: /proc/run cannot be made", "nothing can be written to /proc"]),
    "out holds another run": (
        ["--out", "BAD/run", "train.learning_rate=0.5"],
        ["out: ", "may not change", "train.learning_rate (was 0.25, now 0.5)", "train.steps (was 7, now 2)", "--out"],
    ),
    "out holds files": (["--out", "BAD/files"], ["out: ", "already holds other files"]),
    # models
    "no teacher": (["teacher.model=/nowhere/model"], ["teacher.model: no such directory", "'/nowhere/model'"]),
    "teacher is a file": (["teacher.model=BAD/file"], ["teacher.model", "is a file", "directory"]),
    "teacher directory empty": (["teacher.model=BAD/nothing"], ["teacher.model", "no config.json"]),
    "config.json cut off": (["teacher.model=BAD/cut_config"], ["teacher.model", "configuration", "download"]),
    "unknown architecture": (["teacher.model=BAD/unknown"], ["teacher.model", "nonesuch", "not a causal language model"]),
    "no decoder": (["teacher.model=BAD/t5"], ["teacher.model", "t5", "not a causal language model"]),
    "weights cut off": (["teacher.model=BAD/half"], ["teacher.model", "half/model.safetensors", "damaged", "Download"]),
    "weights not weights": (["teacher.model=BAD/pointer"], ["teacher.model", "pointer/model.safetensors", "damaged"]),
    "weights missing": (["teacher.model=BAD/no_weights"], ["teacher.model", "holds no weights", "Download"]),
    "weight files missing": (["teacher.model=BAD/parts"], ["lacks 2 of 3 weight files", "model-00002-of-00003", "again"]),
    "weight index damaged": (["teacher.model=BAD/index"], ["index/model.safetensors.index.json", "damaged"]),
    "student weights cut off": ([*PRETRAINED, "student.model=BAD/half"], ["student.model", "damaged"]),
    "tokenizer missing": (["teacher.model=BAD/no_tokenizer"], ["teacher.model", "the tokenizer", "tokenizer.json"]),
    "tokenizer cut off": (["teacher.model=BAD/cut_tokenizer"], ["teacher.model", "the tokenizer", "damaged"]),
    "not on the hub": (["teacher.model=some/model"], ["teacher.model = some/model", "hub cannot be reached", "directory"]),
    "tokenizers disagree": (
        [*PRETRAINED, "student.model=BAD/swapped"],
        ["disagree on 4 of 512 ids", "id 300: teacher", "id 301", "id 302", "Choose a student"],
    ),
    "teacher's context": (["data.sequence_length=1024"], ["data.sequence_length: 1024", "teacher", "at most 512"]),
    "student's context": (
        [*PRETRAINED, "student.model=BAD/short"],
        ["data.sequence_length: 64", "student", "at most 32"],
    ),
    "shards that do not divide": (["teacher.shards=3"], ["teacher.shards = 3", "num_attention_heads = 8"]),
    "layers out of range": (["student.layers=[0, 9]"], ["student.layers", "0 to 4", "[9]"]),
    "unknown field": ([*SCRATCH, "student.architecture={depth: 2}"], ["student.architecture.depth", "LlamaConfig", "2"]),
    "field of wrong type": ([*SCRATCH, "student.architecture={hidden_size: big}"], ["hidden_size", "'big'", "int"]),
    "impossible shape": ([*SCRATCH, "student.architecture={hidden_size: 63}"], ["student.architecture", "63", "heads"]),
    "unknown activation": ([*SCRATCH, "student.architecture={hidden_act: nope}"], ["student.architecture", "'nope'"]),
    "adapters nowhere": (["student.lora={target_modules: [nope]}"], ["student.lora.target_modules", "['nope']"]),
    "peft missing": (["student.lora={}"], ["student.lora", "peft is not installed", "pip install"]),
    # data
    "no data file": (["data.train=absent.jsonl"], ["data.train: absent.jsonl", "no such file"]),
    "no validation file": (["data.valid=absent.jsonl"], ["data.valid: absent.jsonl", "no such file"]),
    "data not on the hub": (["data.train=some/data"], ["data.train: some/data", "hub, which does not answer", "local file"]),
    "empty file": (["data.train=BAD/empty.jsonl"], ["data.train", "empty.jsonl is empty"]),
    "blank lines only": (["data.train=BAD/blank.jsonl"], ["data.train", "blank.jsonl is empty"]),
    "not JSON": (["data.train=BAD/broken.jsonl"], ["data.train", "broken.jsonl cannot be read as json"]),
    "not parquet": (["data.train=BAD/broken.parquet"], ["data.train", "cannot be read as parquet"]),
    "unknown kind": (["data.train=BAD/text.docx"], ["data.train", "'.docx'", ".jsonl"]),
    "directory without data": (["data.train=BAD/nothing"], ["data.train", "no data files"]),
    "missing column": (["data.text_column=body"], ["no column 'body'", "it has: text", "data.text_column"]),
    "other format": (["data.train=BAD/chat.jsonl"], ["no column 'text'", "messages", "data.format"]),
    "number instead of text": (["data.train=BAD/numbers.jsonl"], ["row 1 of column 'text'", "int 3"]),
    "everything held out": (["data.valid=null", "data.valid_documents=5000"], ["data.train", "1504", "5000", "data.valid"]),
    "no chat template": (CHAT, ["data.format: chat needs a chat template", "data.chat_template"]),
    "bad Jinja": ([*CHAT, "data.chat_template={{ nope("], ["data.chat_template: not valid Jinja", "line 1"]),
    "failing Jinja": ([*CHAT, "data.chat_template={{ nope.x }}"], ["row 3", "'nope' is undefined", "data.chat_template"]),
    "no template file": ([*CHAT, "data.chat_template=absent.jinja"], ["data.chat_template", "'absent.jinja'"]),
    "no loss position": ([*CHAT, "data.train=BAD/questions.jsonl", TEMPLATE], ["row 3", "no loss position", "loss_on"]),
    "rows too long": ([*PAIRS, "data.sequence_length=8"], ["row 3", "tokens", "data.sequence_length = 8", "overlong"]),
    "all rows dropped": (
        [*PAIRS, "data.sequence_length=8", "data.overlong=drop"],
        ["no loss position", "dropped", "data.overlong"],
    ),
    "ids not shared": ([*SCRATCH, "student.architecture={vocab_size: 300}"], ["token", "ids below 300", "resize_to_teacher"]),
}  # fmt: skip

EVAL_CASES: dict[str, tuple[list[str], list[str]]] = {
    "no model": (["/nowhere", "--teacher", str(STORIES)], ["MODEL: no such directory", "'/nowhere'"]),
    "no teacher": ([str(STORIES), "--teacher", "/nowhere"], ["--teacher: no such directory", "'/nowhere'"]),
    "half a model": (["BAD/half", "--teacher", str(STORIES)], ["MODEL", "half/model.safetensors is damaged"]),
    "other weights": (["BAD/wide", "--teacher", str(STORIES)], ["MODEL", "no weights that fit 47 parameters"]),
    "other logits": (["BAD/scaled", "--teacher", str(STORIES)], ["MODEL: the logits of LlamaForCausalLM, rebuilt"]),
    "rouge of text": ([str(STORIES), "--teacher", str(STORIES), "--rouge"], ["--rouge", "format=prompt_response", "text"]),
    "no data": ([str(STORIES), "--teacher", str(STORIES), "--data", "absent.jsonl"], ["--data: absent.jsonl", "no such"]),
    "unknown key": ([str(STORIES), "--teacher", str(STORIES), "sequence_lenght=9"], ["data.sequence_length?"]),
    "unused key": ([str(STORIES), "--teacher", str(STORIES), "student.lora={}"], ["student.lora: eval makes no use"]),
    "split": ([str(STORIES), "--teacher", str(STORIES), "split=test"], ["data.split: eval", "data.valid_split"]),
    "payload": ([str(STORIES), "--teacher", str(STORIES), "teacher.payload=logits"], ["teacher.payload: eval makes no use"]),
    "not on the hub": (["some/model", "--teacher", str(STORIES)], ["MODEL = some/model", "hub cannot be reached"]),
    "context": ([str(STORIES), "--teacher", str(STORIES), "sequence_length=900"], ["900", "at most 512"]),
}  # fmt: skip

USAGE = {
    "unknown command": (["trian"], "No such command 'trian'"),
    "no configuration": (["train"], "Missing argument"),
    "unknown option": (["train", "config.yaml", "--steps", "3"], "No such option: --steps"),
    "option without value": (["train", "config.yaml", "--out"], "requires an argument"),
    "no teacher": (["eval", "model", "--data", "x.jsonl"], "Missing option '--teacher'"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory full of broken models and data."""
    root = tmp_path_factory.mktemp("bad")

    def model(name: str, **changes: Any) -> Path:
        shutil.copytree(STORIES, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | changes))
        return root / name

    def rows(name: str, *lines: Any) -> None:
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    weights = (STORIES / "model.safetensors").read_bytes()
    (model("half") / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (model("pointer") / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (model("no_weights") / "model.safetensors").unlink()
    files = {str(number): f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    for directory, index in ((model("parts"), {"weight_map": files}), (model("index"), [])):
        (directory / "model.safetensors").rename(directory / files["1"])
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    bare = model("no_tokenizer")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    (model("cut_tokenizer") / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    (model("cut_config") / "config.json").write_text('{"model_type": "llama", ')
    model("unknown", model_type="nonesuch")
    model("t5", model_type="t5", architectures=["T5ForConditionalGeneration"])
    model("short", max_position_embeddings=32)
    model("wide", hidden_size=128)
    model("scaled", logits_scaling=2.0)  # a Llama's forward knows nothing of it
    tokenizer = json.loads((STORIES / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    moved = [token for token, index in vocabulary.items() if 300 <= index < 304]
    vocabulary.update(zip(moved, [vocabulary[token] for token in [*moved[1:], moved[0]]], strict=True))
    (model("swapped") / "tokenizer.json").write_text(json.dumps(tokenizer))

    for name in ("nothing", "run", "files"):
        (root / name).mkdir()
    begun = build_config(CONFIG, ["train.learning_rate=0.25", "train.steps=7"], {"out": str(root / "run")})
    write_config(with_absolute_paths(begun))
    for name in ("file", "run/run.json", "files/notes", "text.docx", "broken.parquet"):
        (root / name).write_text("x")
    (root / "empty.jsonl").write_text("")
    (root / "blank.jsonl").write_text("\n\n")
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    rows("numbers.jsonl", *[{"text": 3}] * 3)
    question, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom and his dog."}
    rows("questions.jsonl", *[{"messages": [question]}] * 3)
    rows("chat.jsonl", *[{"messages": [question, answer]}] * 3)
    rows("pairs.jsonl", *[{"prompt": "Who went home?", "response": "Tom and his small brown dog."}] * 3)
    return root


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An own working directory with config.yaml, in which nothing may appear; neither Ray nor a hub can be reached."""

    def away(*_: Any) -> None:
        raise OSError("no network in this test")

    def ray_cluster() -> None:
        raise AssertionError("the run went on to the cluster")

    monkeypatch.setattr(launch, "ray_cluster", ray_cluster)
    monkeypatch.setattr(hub.socket, "create_connection", away)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    had_ray = ray.is_initialized()
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert ray.is_initialized() == had_ray


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command line in this process: exit code and stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["taid-ray", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def refused(call: Callable[..., tuple[int, str]], *arguments: str) -> str:
    """The one message of a command that must end in exit code 2 without waiting for anything."""
    start = time.monotonic()
    code, err = call(*arguments)
    assert code == 2
    assert time.monotonic() - start < 60  # seconds on an idle machine
    assert err.startswith("error: ") and err.endswith("\n"), err
    assert "Traceback" not in err and "Warning" not in err and "Retrying" not in err
    assert len(err.splitlines()) == 1 and len(err) < 500, err
    return err


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_in_one_message(
    case: str, bad: Path, call: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "peft missing":
        monkeypatch.setitem(sys.modules, "peft", None)
    arguments, expected = CASES[case]
    message = refused(call, "train", "config.yaml", *(a.replace("BAD", str(bad)) for a in arguments))
    assert [part for part in expected if part not in message] == [], message


@pytest.mark.parametrize("case", EVAL_CASES)
def test_eval_names_its_arguments(case: str, bad: Path, call: Callable[..., tuple[int, str]]) -> None:
    arguments, expected = EVAL_CASES[case]
    data = [] if "--data" in arguments else ["--data", str(BUNDLE / "tinystories_valid.jsonl")]
    message = refused(call, "eval", *(a.replace("BAD", str(bad)) for a in arguments), *data, "valid_documents=4")
    assert [part for part in expected if part not in message] == [], message
    assert not constants.HF_HUB_OFFLINE  # the next measurement tries the hub again


def test_an_unreachable_hub_is_not_left_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[Any, ...]:
        return os.environ.get("HF_HUB_OFFLINE"), constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE

    monkeypatch.delenv("HF_HUB_OFFLINE")
    with hub.restoring_hub_mode():
        hub.offline_if_unreachable([None, str(STORIES)])
        assert state() == (None, False, False)
        with pytest.raises(ZeroDivisionError), hub.restoring_hub_mode():
            hub.offline_if_unreachable(["some/model"])
            assert state() == ("1", True, True)
            1 / 0  # noqa: B018
        assert state() == (None, False, False)
        hub.offline_if_unreachable(["some/model"])
        with hub.restoring_hub_mode():
            hub.offline_if_unreachable(["some/model"])
        assert state() == ("1", True, True)
    assert state() == (None, False, False)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.yaml", None, "no such file"),
        ("", None, "is a directory"),
        ("binary.yaml", bytes(range(256)), "not a text file"),
        ("zeros.yaml", b"teacher: a\0b", "not valid YAML"),
        ("tab.yaml", b"teacher:\n\tmodel: a\n", "not valid YAML: line 2, column 1: found character '\\t'"),
        ("empty.yaml", b"", "expected a mapping of sections"),
    ],
)
def test_a_bad_configuration_file_is_named(
    name: str,
    content: bytes | None,
    expected: str,
    tmp_path_factory: pytest.TempPathFactory,
    call: Callable[..., tuple[int, str]],
) -> None:
    path = tmp_path_factory.mktemp("configs") / name
    if content is not None:
        path.write_bytes(content)
    message = refused(call, "train", str(path))
    assert message.startswith(f"error: {path}: ") and expected in message


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(case: str, call: Callable[..., tuple[int, str]]) -> None:
    arguments, expected = USAGE[case]
    code, err = call(*arguments)
    assert code == 2
    assert expected in " ".join(err.split()) and "Traceback" not in err


def test_ctrl_c_while_checking(call: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "prepare", prepare)
    assert call("train", "config.yaml") == (130, "interrupted\n")


def test_the_console_entry() -> None:
    """A process of its own, so that what is printed at import counts too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "taid_ray.cli", "train", "config.yaml", "data.train=absent.jsonl"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    loading, checking = found.stdout.splitlines()[:2]
    assert (found.returncode, loading) == (2, "loading Ray, torch and transformers")
    assert re.fullmatch(r"\[ +\d+\.\ds\] checking models and data", checking)
    assert found.stderr == (
        "error: data.train: absent.jsonl: no such file or directory. "
        "Name an existing one (.json, .jsonl, .parquet, .csv, .txt, .ndjson, .tsv, .arrow; text also as .gz, .zst, .bz2) or a "
        "hub dataset.\n"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # not the clock's time, which depends on what else works here
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 40  # 5 s of imports on an idle machine


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "there", "config.yaml", "train.steps=7", "schedule.t_start=0.3"],
        ["config.yaml", "--out", "there", "train.steps=7", "schedule.t_start=0.3"],
        ["config.yaml", "train.steps=7", "--out", "there", "schedule.t_start=0.3"],
        ["config.yaml", "train.steps=7", "schedule.t_start=0.3", "--out=there"],
    ],
)
def test_arguments_come_in_any_order(
    arguments: list[str], call: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(cli, "run", seen.append)
    assert call("train", *arguments) == (0, "")
    (config,) = seen
    assert (config.train.steps, config.schedule.t_start, config.run_dir.name) == (7, 0.3, "there")


@pytest.mark.parametrize("command", [["train", "config.yaml"], ["quickstart"]])
@pytest.mark.parametrize("name", ["run #1", "a: b", "[x", "007", "null"])
def test_the_run_directory_is_taken_as_it_is_written(
    name: str, command: list[str], call: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(cli, "run", seen.append)
    monkeypatch.setattr(example, "show_samples", lambda *_: None)
    assert call(*command, "--out", name, "train.steps=70") == (0, "")
    assert (seen[0].run_dir, seen[0].train.steps) == (Path(name).absolute(), 70)


def test_the_package_may_lie_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = tmp_path_factory.mktemp("a #1: [b") / "quickstart"
    shutil.copytree(BUNDLE.parent / "configs", bundle.parent / "configs")
    monkeypatch.setattr(example, "BUNDLE", bundle)
    config = example.quickstart_config(["data.valid=mine.jsonl"], None)
    assert config.teacher.model == str(bundle / "stories260k")
    assert (config.data.train, config.data.valid) == (str(bundle / "tinystories_train.jsonl"), "mine.jsonl")
    assert config.run_dir.parent == Path("runs").absolute()
