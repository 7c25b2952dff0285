"""The teacher of `taid-ray quickstart --vision`: a tiny model that sees, trained on drawn scenes by this project's own SFT.

    python -m benchmarks.vision_teacher    # some minutes on two idle cores

Writes taid_ray/quickstart/vision: the model with its tokenizer and image processor, and accuracy.json, the shares of its right
answers to questions on held-out scenes, with the pictures and with grey ones in their place. What is trained stays in --out,
so that the same command goes on after an interruption.
"""

import argparse
import random
import re
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from taid_ray.cli.picture_answers import scene_answers, shares_right
from taid_ray.cli.quickstart import BUNDLE
from taid_ray.cli.quickstart_vision import answer_table, made_scenes
from taid_ray.config.models import TeacherConfig
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.demo.scenes import PAPER, SIDE, held_out, talks, write_talks
from taid_ray.driver.launch import distill
from taid_ray.files import write_json
from taid_ray.media.processor import MediaSettings
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.pair import image_backend, media_of

TEACHER = BUNDLE / "vision"
SCENES, EACH = 10_000, 20
"""Scenes to train on, with up to five questions each; held-out ones for each kind of question."""
SEED = 1
PATCH, WIDTH = SIDE // 2, 64
"""Pixels of a patch, so that each has one object at most; width of both parts of the model."""
SPREAD = 0.1
"""Standard deviation of new weights: with transformers' 0.02 so narrow a model is long in learning to see."""
UNKNOWN, PADDING, END, USER, ASSISTANT, IMAGE = (
    "<|unknown|>",
    "<|padding|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<image>",
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main() -> None:
    """Trains the teacher, puts it into the package, and measures it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/vision-teacher"))
    out = parser.parse_args().out
    asked = {scene for scene, _ in made_scenes()[1]}  # those that the quickstart, and `measure`, ask about
    made = [(scene, questions) for scene, questions in talks(SCENES, random.Random(SEED)) if scene not in asked]
    write_talks(made, out / "scenes" / "train.jsonl")
    known = {scene for scene, _ in made}
    write_talks(held_out(EACH, random.Random(SEED + 1), known), out / "scenes" / "valid.jsonl")
    save_architecture(out / "architecture", words_of(out / "scenes" / "train.jsonl"))
    run = distill(run_config(out))
    TEACHER.mkdir(exist_ok=True)
    for file in run.model.iterdir():
        if file.suffix != ".md":  # the model card is about the run; SOURCE.md is ours
            shutil.copy(file, TEACHER)
    measure()


def words_of(rows: Path) -> list[str]:
    """Lists the words of questions and answers."""
    contents = re.findall(r'"content": "(?:<image>)?([^"]*)"', rows.read_text(encoding="utf-8"))
    return sorted({word for content in contents for word in re.findall(r"\w+|\?", content)})


def save_architecture(directory: Path, words: list[str]) -> None:
    """Saves a model's config, a tokenizer of these words, and an image processor that leaves scenes as large as they are."""
    import transformers
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    special = [PADDING, END, USER, ASSISTANT, IMAGE]
    known = {word: number for number, word in enumerate([UNKNOWN, *special, *words])}
    splitter = Tokenizer(WordLevel(known, unk_token=UNKNOWN))
    splitter.pre_tokenizer = Whitespace()
    splitter.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter,
        unk_token=UNKNOWN,
        pad_token=PADDING,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[value / 255 for value in PAPER],  # so that paper is zero
        image_std=[0.5] * 3,
    )
    transformers.LlavaProcessor(
        images,
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which `default` leaves out
    ).save_pretrained(directory)
    model_config(known).save_pretrained(directory)


def model_config(known: dict[str, int]) -> Any:
    """Makes the config of a LLaVA of CLIP's tower, two layers deep, and a Llama of four layers. known: ids of the tokens."""
    import transformers

    both = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "initializer_range": SPREAD}
    tower = {"model_type": "clip_vision_model", "num_hidden_layers": 2, "image_size": SIDE, "patch_size": PATCH}
    text = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(known),
        "max_position_embeddings": 256,
        "pad_token_id": known[PADDING],
        "bos_token_id": None,
        "eos_token_id": known[END],
    }
    return transformers.LlavaConfig.from_dict(
        {
            "vision_config": both | tower,
            "text_config": both | text,
            "image_token_id": known[IMAGE],
            "image_seq_length": (SIDE // PATCH) ** 2,
            "vision_feature_layer": -1,
            "initializer_range": SPREAD,
        }
    )


def run_config(out: Path) -> DistillConfig:
    """The run that trains the teacher, in `out`, from nothing and without a teacher of its own."""
    return build_config(
        {
            "name": "vision-teacher",
            "out": str(out / "run"),
            "device": "cpu",
            "teacher": None,
            "loss": {"name": "sft"},
            "student": {"model": str(out / "architecture"), "init": "scratch", "dtype": "float32"},
            "data": {
                "format": "chat",
                "train": str(out / "scenes" / "train.jsonl"),
                "valid": str(out / "scenes" / "valid.jsonl"),
                "images_column": "image",
                "images_directory": str(out / "scenes"),
                "sequence_length": 256,
            },
            "train": {
                "steps": 1500,
                "batch_size": 16,
                "micro_batch_size": 16,
                "learning_rate": 3e-3,
                "lr_schedule": "cosine",
                "warmup_steps": 50,
                "eval_every": 300,
            },
        }
    )


def measure() -> None:
    """Writes accuracy.json beside the model, and prints it."""
    (_, asked), section = made_scenes(), TeacherConfig(model=str(TEACHER))
    processor = media_of(section, MediaSettings(image_backend())).processor
    model = load_causal_lm(section, dtype="float32", images=True)
    seen, blind = (scene_answers(model, processor, asked, grey) for grey in (False, True))
    write_json(TEACHER / "accuracy.json", {"shown": shares_right(asked, seen), "grey": shares_right(asked, blind)})
    Console().print(answer_table(asked, {"teacher": seen}, {"teacher": blind}))


if __name__ == "__main__":
    main()
