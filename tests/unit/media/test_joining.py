import pytest
import torch

from taid_ray.media.families import FAMILIES
from taid_ray.media.joining import mrope_positions
from taid_ray.media.pictures import pictures_of
from taid_ray.models.head import hidden_states
from tests.support.tiny_vision import content_of, row_ids, tiny_media, tiny_model

MROPE = [name for name, family in FAMILIES.items() if family.mrope]


@pytest.mark.parametrize("name", MROPE)
def test_mrope_positions_are_the_model_s_own(name: str) -> None:
    media, model = tiny_media(name), tiny_model(name)
    one, two = "<|vision_start|>", "<|vision_end|>"
    ids, images = row_ids(
        media, "He saw", one, (60, 90), two, "and", one, (28, 28), two, one, (120, 30), two, "far away."
    )
    pictures = pictures_of(media, (tuple(images),), content_of)
    tokens, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
    grids = torch.cat([picture.tensors["image_grid_thw"] for picture in pictures[0]])
    types = (tokens == media.image_token_id).long()
    own, _ = model.model.get_rope_index(tokens, mm_token_type_ids=types, image_grid_thw=grids)
    found = media.inputs(tokens, positions, pictures)["position_ids"]
    assert torch.equal(found[1:], own) and torch.equal(found[0], positions)


def test_mrope_positions_restart_with_each_document_and_run_on_over_padding() -> None:
    media = tiny_media("qwen2_5_vl")
    first, second = row_ids(media, "a", (60, 90)), row_ids(media, (56, 56), "bc")
    alone = []
    for ids, images in (first, second):
        positions = torch.arange(len(ids) + 2)[None]
        alone.append(mrope_positions(positions, pictures_of(media, (tuple(images),), content_of), 2))
    length = len(first[0])
    shifted = [image.__class__(**{**vars(image), "start": image.start + length}) for image in second[1]]
    packed = torch.cat([torch.arange(length), torch.arange(len(second[0]) + 2)])[None]
    pictures = pictures_of(media, ((*first[1], *shifted),), content_of)
    found = mrope_positions(packed, pictures, 2)
    assert torch.equal(found, torch.cat([alone[0][..., :length], alone[1]], dim=-1))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_row_sees_does_not_depend_on_its_neighbours(name: str) -> None:
    """Hidden states of a row alone are those that it has in a batch, before and behind rows with other images and with none."""
    media, model = tiny_media(name), tiny_model(name)
    rows = [row_ids(media, "a", (60, 90), "b"), row_ids(media, "cdefg"), row_ids(media, (30, 30), "x", (120, 40), "y")]

    def hidden(chosen: list[int]) -> torch.Tensor:
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([rows[i][0] + [0] * (length - len(rows[i][0])) for i in chosen])
        positions = torch.arange(length).expand(len(chosen), -1)
        pictures = pictures_of(media, tuple(tuple(rows[i][1]) for i in chosen), content_of)
        with torch.no_grad():
            return hidden_states(model, media.inputs(ids, positions, pictures))

    together = hidden([0, 1, 2])
    for number, (ids, _) in enumerate(rows):
        torch.testing.assert_close(hidden([number])[0, : len(ids)], together[number, : len(ids)], rtol=1e-5, atol=1e-5)
    blind = rows[0][0]
    assert media.image_token_id in blind and together.isfinite().all()
