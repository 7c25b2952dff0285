"""Tiny random vision-language models of every family, with real processors on the bundled tokenizer; nothing is downloaded."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from taid_ray.media.families import FAMILIES
from taid_ray.media.processor import MediaProcessor, MediaSettings, drawn
from taid_ray.media.refs import ImageRef
from tests.support.paths import BUNDLE

TILE = 28
"""Side of a tile in pixels; four patches of 14, of which the projectors make 4, or 1 token."""
TEMPLATE = (
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}"
    "{{% for p in m.content %}}{{% if p.type == 'image' %}}{mark}{{% else %}}{{{{ p.text }}}}{{% endif %}}{{% endfor %}}"
    "{{% endif %}}<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
SPECIAL = {
    "internvl": ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
    "llava": ["<image>"],
    "lfm2_vl": ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    + [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)],
    "qwen2_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    + [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)],
}
"""Tokens of each kind of processor, the one that stands for a feature first."""
KIND = {"qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen2_vl", "smolvlm": "idefics3"}
"""Families whose tokens are those of another one."""


def tiny_tokenizer(name: str) -> Any:
    """The bundled tokenizer with a family's special tokens and a chat template that knows images."""
    from transformers import AutoTokenizer

    kind = KIND.get(name, name)
    tokenizer = AutoTokenizer.from_pretrained(str(BUNDLE / "stories260k"))
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[kind], "<|im_start|>", "<|im_end|>"]})
    named = {"image_token": SPECIAL[kind][0]}
    if kind == "internvl":
        named = dict(
            zip(
                ("context_image_token", "start_image_token", "end_image_token", "video_token"),
                SPECIAL[kind],
                strict=True,
            )
        )
    tokenizer.init_kwargs["extra_special_tokens"] = named
    tokenizer._set_model_specific_special_tokens(special_tokens=named)
    tokenizer.chat_template = TEMPLATE.format(mark=mark_of(name))
    return tokenizer


def mark_of(name: str) -> str:
    """What a family's chat template writes for an image."""
    kind = KIND.get(name, name)
    return "<|vision_start|><|image_pad|><|vision_end|>" if kind == "qwen2_vl" else SPECIAL[kind][0]


def tiny_processor(name: str, backend: str = "pil") -> Any:
    """The transformers processor of a family, with tiles of TILE pixels."""
    import transformers as T

    tokenizer, pil = tiny_tokenizer(name), "Pil" if backend == "pil" else ""
    square = {"height": TILE, "width": TILE}
    template = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    if name == "llava":
        images = getattr(T, f"CLIPImageProcessor{pil}")(size={"shortest_edge": TILE}, crop_size=square)
        return T.LlavaProcessor(
            images, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, **template
        )
    if name == "idefics3":
        images = getattr(T, f"Idefics3ImageProcessor{pil}")(
            size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE}
        )
        return T.Idefics3Processor(images, image_seq_len=1, **template)
    if name == "smolvlm":
        images = getattr(T, f"SmolVLMImageProcessor{pil}")(
            size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE}
        )
        return T.SmolVLMProcessor(images, video_processor=T.SmolVLMVideoProcessor(), image_seq_len=1, **template)
    if name == "internvl":
        images = getattr(T, f"GotOcr2ImageProcessor{pil}")(size=square, max_patches=4)
        return T.InternVLProcessor(images, video_processor=T.InternVLVideoProcessor(), image_seq_length=1, **template)
    if name == "lfm2_vl":
        images = T.Lfm2VlImageProcessor(
            encoder_patch_size=14, tile_size=56, min_image_tokens=1, max_image_tokens=64, max_tiles=4, min_tiles=2
        )
        return T.Lfm2VlProcessor(images, **template)
    patch = 16 if name == "qwen3_vl" else 14
    images = getattr(T, f"Qwen2VLImageProcessor{pil}")(
        patch_size=patch, size={"shortest_edge": 4 * patch**2, "longest_edge": 64 * patch**2}
    )
    maker, video = {
        "qwen2_vl": (T.Qwen2VLProcessor, T.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (T.Qwen2_5_VLProcessor, T.Qwen2VLVideoProcessor),
        "qwen3_vl": (T.Qwen3VLProcessor, T.Qwen3VLVideoProcessor),
    }[name]
    return maker(images, video_processor=video(), **template)


@cache
def tiny_media(name: str, backend: str = "pil") -> MediaProcessor:
    """The MediaProcessor of a family's tiny processor."""
    return MediaProcessor(tiny_processor(name, backend), FAMILIES[name], MediaSettings(backend))


def tiny_config(name: str, **text: Any) -> Any:
    """The config of a tiny model of a family. text: values of its language model's config."""
    import transformers as T

    tokenizer = tiny_tokenizer(name)
    token = {"image_token_id": tokenizer.convert_tokens_to_ids(SPECIAL[KIND.get(name, name)][0])}
    text = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
    } | text
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "patch_size": 14,
    }
    llama = {"model_type": "llama"} | text
    if name == "llava":
        tower = {"model_type": "clip_vision_model", "image_size": TILE, "projection_dim": 16} | vision
        return T.LlavaConfig(vision_config=tower, text_config=llama, image_seq_length=4, **token)
    if name == "internvl":
        tower = vision | {"image_size": [TILE, TILE], "patch_size": [14, 14]}
        language = {"model_type": "qwen2"} | text
        return T.InternVLConfig(vision_config=tower, text_config=language, image_seq_length=1, **token)
    if name in ("idefics3", "smolvlm"):
        maker = T.Idefics3Config if name == "idefics3" else T.SmolVLMConfig
        return maker(vision_config={"image_size": TILE} | vision, text_config=llama, scale_factor=2, **token)
    if name == "lfm2_vl":
        tower = {"model_type": "siglip2_vision_model", "num_patches": 256} | vision
        language = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]} | text
        return T.Lfm2VlConfig(vision_config=tower, text_config=language, downsample_factor=2, **token)
    return _qwen_config(name, tokenizer, text, token)


def _qwen_config(name: str, tokenizer: Any, text: dict[str, Any], token: dict[str, int]) -> Any:
    import transformers as T

    others = {
        f"{key}_token_id": tokenizer.convert_tokens_to_ids(mark)
        for key, mark in (
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    language = text | {"rope_parameters": rope}
    if name == "qwen2_vl":
        vision = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "hidden_size": text["hidden_size"]}
        return T.Qwen2VLConfig(vision_config=vision, text_config=language, **token, **others)
    vision = {
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "intermediate_size": 24,
        "out_hidden_size": text["hidden_size"],
    }
    if name == "qwen2_5_vl":
        return T.Qwen2_5_VLConfig(
            vision_config=vision | {"fullatt_block_indexes": [1]}, text_config=language, **token, **others
        )
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    language |= {"head_dim": 8, "rope_parameters": rope | {"mrope_interleaved": True}}
    return T.Qwen3VLConfig(vision_config=vision, text_config=language, **token, **others)


def tiny_model(name: str, seed: int = 0, **text: Any) -> Any:
    """A random model of a family, in eval mode; what zeros would hide is made random, too."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(tiny_config(name, **text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def save_tiny(name: str, path: Path, seed: int = 0, **text: Any) -> Path:
    """Saves a random model of a family with its processor, as a Hugging Face directory."""
    tiny_model(name, seed, **text).save_pretrained(path)
    tiny_processor(name).save_pretrained(path)
    return path


def image_ref(media: MediaProcessor, start: int, width: int, height: int, digest: str = "0" * 32) -> ImageRef:
    """The reference of an image of some size, whose tokens begin at `start`."""
    return ImageRef(digest, start, len(media.layout(width, height).ids), width, height, "memory:")


def row_ids(media: MediaProcessor, *parts: str | tuple[int, int]) -> tuple[list[int], list[ImageRef]]:
    """The ids and images of a row; a part is a text, or the size of a drawn image."""
    ids: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, str):
            ids += media.processor.tokenizer(part, add_special_tokens=False)["input_ids"]
        else:
            images.append(image_ref(media, len(ids), *part))
            ids += media.layout(*part).ids.tolist()
    return ids, images


def content_of(ref: ImageRef) -> bytes:
    """The bytes of an image of `row_ids`."""
    return drawn(ref.width, ref.height)
