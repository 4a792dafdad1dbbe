"""What the image looks at in a prompt: right tokens, right shares, and every way in which a word can't be read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.registry import open_backbone, open_prompt
from trace_sdk.backbones.text_attention import attend_to_text
from trace_sdk.backbones.words import WordedPrompt
from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError, CheckpointError
from trace_sdk.teacher.teacher import Teacher, TeacherSettings
from trace_sdk.teacher.words import shares, word_maps

HEIGHT, WIDTH = 96, 120
TEXT = 12  # tokens


@pytest.fixture(scope="module")
def photo() -> Any:
    return np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)


def made_up_prompt(backbone: Any) -> WordedPrompt:
    """Random embeddings, in which "dog" is two tokens and "cat" one."""
    generator = torch.Generator().manual_seed(4)
    embeddings = {
        name: value[:, :TEXT] if name == "mask" else torch.randn(*value.shape, generator=generator)
        for name, value in backbone.prompt.items()
    }
    embeddings["tokens"] = 3 * torch.randn(1, TEXT, backbone.prompt["tokens"].shape[-1], generator=generator)
    if "mask" in embeddings:
        embeddings["mask"] = (torch.arange(TEXT) < TEXT - 3).long()[None]  # the last three are padding
    return WordedPrompt("a dog and a cat", embeddings, ((2, 4, 1), (4, 5, 2), (12, 15, 6)))


def text_calls(backbone: Any, prompt: WordedPrompt, x_t: Tensor, t: float) -> list[tuple[Tensor, Tensor, Any, float]]:
    """(image's queries, text's keys, what is added to the scores, scale) of each call, without tap and hooks."""
    calls: list[Any] = []
    attend = F.scaled_dot_product_attention

    def listen(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **more: Any) -> Tensor:
        calls.append((query, key, attn_mask, more.get("scale") or 1 / math.sqrt(query.shape[-1])))
        return attend(query, key, value, attn_mask, **more)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(F, "scaled_dot_product_attention", listen)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", listen)
        backbone(x_t, t, prompt=prompt.embeddings)
    tokens = math.prod(backbone.token_grid((HEIGHT, WIDTH)))
    found = []
    for query, key, mask, scale in calls:
        if backbone.family in ("sd", "sdxl", "pixart"):
            if key.shape[2] == TEXT:
                found.append((query, key, mask, scale))
        elif key.shape[2] >= (192 if backbone.family == "z-image" else tokens) + TEXT:
            if backbone.family == "sd3":
                image, text = slice(0, tokens), slice(tokens, tokens + TEXT)
            elif backbone.family == "z-image":  # [180 image tokens, 12 of padding, text, padding]
                assert tokens == 180
                image, text = slice(0, 180), slice(192, 192 + TEXT)
            else:  # AuraFlow has register tokens before the text
                image = slice(key.shape[2] - tokens, key.shape[2])
                text = slice(image.start - TEXT, image.start)
            found.append((query[:, :, image], key[:, :, text], None, scale))
    return found


def test_shares_are_those_of_a_float64_softmax_over_the_text(model: Any, photo: Any) -> None:
    """Every family: the words' shares of each call, their mean over heads and blocks, and all of them together 1."""
    backbone = model.backbone
    prompt = made_up_prompt(backbone)
    teacher = Teacher(backbone, TeacherSettings(size=WIDTH))
    found = word_maps(teacher, photo, prompt, ["dog", "cat"], (0.3,))
    grid = backbone.token_grid((HEIGHT, WIDTH))
    assert found.maps.shape == (1, 2, *grid) and found.maps.dtype == np.float32
    with torch.inference_mode():
        clean = backbone.encode(teacher.prepare(photo))
        x_t = teacher.trajectory(clean, teacher.noise_like(clean), (0.3,))[0][1]
    expected = []
    for query, key, mask, scale in text_calls(backbone, prompt, x_t, 0.3):
        scores = query.double() @ key.double().mT * scale
        if mask is not None:
            scores = scores + mask.double()
        share = scores.softmax(-1).mean(1)[0]  # [n, T]
        if "mask" in prompt.embeddings:
            assert share[:, -3:].max() < 1e-12
        halvings = round(math.log2(math.sqrt(grid[0] * grid[1] / len(share))))
        words = torch.stack([share[:, [1, 2]].sum(1), share[:, 6]]).unflatten(1, [side >> halvings for side in grid])
        expected.append(F.interpolate(words[None], grid, mode="bilinear")[0])
    assert expected
    np.testing.assert_allclose(found.maps[0], torch.stack(expected).mean(0).numpy(), atol=2e-5)
    assert found.maps.std() > 1e-3 and not np.allclose(found.maps[0, 0], found.maps[0, 1], atol=1e-3)
    seen: list[Any] = []
    with torch.inference_mode():
        answer = attend_to_text(backbone, prompt.embeddings, x_t, 0.3, seen.append)
        assert torch.equal(answer, backbone(x_t, 0.3, prompt=prompt.embeddings))
    assert len(seen) == len(expected)
    for attention in seen:
        torch.testing.assert_close(shares(attention, [range(TEXT)]), torch.ones(1, 1, *attention.grid))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_maps_on_a_gpu_are_those_of_the_cpu(model: Any, photo: Any) -> None:
    prompt = made_up_prompt(model.backbone)
    settings = TeacherSettings(size=WIDTH)
    found, expected = (
        word_maps(Teacher(backbone, settings), photo, prompt, ["dog", "cat"], (0.3,))
        for backbone in (open_backbone(model.folder, device="cuda"), model.backbone)
    )
    np.testing.assert_allclose(found.maps, expected.maps, atol=5e-3)


PROMPT = "a  dog, and\na catalog of dogs"


@pytest.mark.parametrize(
    "name", ["sd", "sdxl", "pixart", "sd3", "flux", "aura-flow", "z-image", "qwen-image", "lumina2", "flux2"]
)
def test_positions_are_the_tokens_that_the_encoder_was_given(
    name: str, open_tiny: Any, with_encoders: Any, tmp_path: Path
) -> None:
    """What the text encoders see at a word's positions, told back by their tokenizers."""
    folder = with_encoders(open_tiny(name), tmp_path / "model")
    given: list[Tensor] = []
    prompt, tokenizers = told_back(folder, PROMPT, given)
    assert prompt.text == "a dog, and a catalog of dogs"
    assert prompt.words == ("a", "dog", "and", "catalog", "of", "dogs")
    length = prompt.embeddings["tokens"].shape[1]
    for word, times in (("dog", 1), ("a", 2), ("Catalog of dogs", 1), ("and a", 1)):
        positions = prompt.positions(word)
        assert positions == sorted(set(positions)) and positions[0] >= 0 and positions[-1] < length
        for (tokenizer, offset), ids in zip(tokenizers, given, strict=True):
            own = [position - offset for position in positions if 0 <= position - offset < len(ids)]
            told = "".join(tokenizer.decode(ids[place]) for place in own).replace(" ", "").lower()
            assert told == word.replace(" ", "").lower() * times
    with pytest.raises(ArgumentError, match=r"'cat' is not in the prompt .*Its words: a, dog, and, catalog, of, dogs"):
        prompt.positions("cat")
    backbone = open_backbone(folder)
    teacher = Teacher(backbone, TeacherSettings(size=64))
    found = word_maps(teacher, np.full((64, 64, 3), 99, np.uint8), prompt, timesteps=(0.2, 0.5))
    assert found.words == prompt.words and found.maps.shape[:2] == (2, 6)
    assert found.maps.min() > 0 and (found.maps[:, :3].sum(1) < 1).all()


def told_back(folder: Path, text: str, given: list[Tensor]) -> tuple[WordedPrompt, list[tuple[Any, int]]]:
    """The prompt, and for each tokenizer that its words come from, where its ids (put into `given`) begin."""
    import json

    from transformers import AutoTokenizer, PreTrainedModel

    from trace_sdk.backbones.registry import families, family_of

    index = json.loads((folder / "model_index.json").read_text())
    family = family_of(index, lambda part: json.loads((folder / part / "config.json").read_text()), "")
    assert family in families().values()
    seen: list[Tensor] = []
    inside: list[Any] = []
    call = PreTrainedModel.__call__

    def listen(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        if not inside:  # models are made of models
            seen.append(ids[0][mask[0].bool()] if mask is not None and family.drops_padding else ids[0])
        inside.append(self)
        try:
            return call(self, *args, **kwargs)
        finally:
            inside.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "__call__", listen, raising=False)
        prompt = open_prompt(folder, text)
    tokenizers = []
    for name, offset in family.words.items():
        number = int(name.partition("_")[2] or 1) - 1
        given.append(seen[number])
        tokenizers.append((AutoTokenizer.from_pretrained(folder / name), offset))
    return prompt, tokenizers


def test_a_word_beyond_what_the_encoder_takes(open_tiny: Any, with_encoders: Any, tmp_path: Path) -> None:
    folder = with_encoders(open_tiny("sd"), tmp_path / "model")
    prompt = open_prompt(folder, "dog " * 30 + "cat")  # 90 letters, a token each
    assert len(prompt.positions("dog")) == 75
    with pytest.raises(ArgumentError, match="'cat' lies beyond what the model's text encoder takes"):
        prompt.positions("cat")


def test_what_takes_no_text_and_what_lacks_its_encoders(
    open_tiny: Any, tiny_backbone: PixelBackbone, photo: Any, tmp_path: Path
) -> None:
    tiny_backbone.save(tmp_path / "pixel")
    with pytest.raises(ArgumentError, match="takes no text"):
        open_prompt(tmp_path / "pixel", "a dog")
    with pytest.raises(CheckpointError, match="has no text encoder, without which no prompt can be read"):
        open_prompt(open_tiny("sd3").folder, "a dog")
    with pytest.raises(ArgumentError, match="has no words"):
        open_prompt(open_tiny("sd3").folder, " ,\n")
    prompt = made_up_prompt(open_tiny("sd").backbone)
    with pytest.raises(ArgumentError, match="pixel-flux takes no text"):
        word_maps(Teacher(tiny_backbone, TeacherSettings(size=64)), photo, prompt)


def test_label_draws_the_words(open_tiny: Any, with_encoders: Any, photos: Path, tmp_path: Path) -> None:
    folder = with_encoders(open_tiny("sd"), tmp_path / "model")
    command = ["label", str(photos / "a.png"), "--backbone", str(folder), "--size", "64", "--stride", "400"]
    asked = ["--plot", "--prompt", "a dog and a cat", "--word", "dog", "--word", "a cat"]
    heights = {}
    for name, options in {"plain": ["--plot"], "words": asked}.items():
        result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / name), *options])
        assert result.exit_code == 0, result.output
        picture = Image.open(tmp_path / name / "a.png.png")
        heights[name] = picture.height
    rows = np.asarray(picture.convert("RGB"))[heights["plain"] :].reshape(-1, 3)
    assert heights["words"] > heights["plain"] + 300 and len(np.unique(rows, axis=0)) > 200
    labels = [(tmp_path / name / "a.png.npz").read_bytes() for name in heights]
    assert labels[0] == labels[1]  # the prompt is for the picture alone
    for options, code, said in (
        (["--prompt", "a dog"], 2, "--prompt is for the pictures of --plot"),
        (["--plot", "--word", "dog"], 2, "--word picks from --prompt"),
        (["--plot", "--prompt", "a dog", "--word", "cat"], 2, "'cat' is not in the prompt 'a dog'"),
    ):
        result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "no"), *options])
        assert result.exit_code == code and said in result.output, result.output
    assert not (tmp_path / "no").exists()
