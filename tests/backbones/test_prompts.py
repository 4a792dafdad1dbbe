"""The null prompt: by the model's own text encoders (tiny ones), once; precomputed; or zeros."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from trace_sdk.backbones import prompts
from trace_sdk.backbones.registry import families, open_backbone
from trace_sdk.errors import CheckpointError

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


def clip(folder: Path, number: str, width: int, *, pooled: int = 0) -> dict[str, Any]:
    """A CLIP text encoder and its tokenizer, saved as `text_encoder<number>` and `tokenizer<number>`."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=pooled or width,
        bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1,
    )  # fmt: skip
    kind = CLIPTextModelWithProjection if pooled else CLIPTextModel
    kind(config).save_pretrained(folder / f"text_encoder{number}")
    tokenizer.save_pretrained(folder / f"tokenizer{number}")
    return {
        f"text_encoder{number}": ["transformers", kind.__name__],
        f"tokenizer{number}": ["transformers", "CLIPTokenizer"],
    }


def t5(folder: Path, number: str, width: int) -> dict[str, Any]:
    """A T5 encoder and its tokenizer."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    T5TokenizerFast(tokenizer_object=raw, vocab=pieces, extra_ids=0).save_pretrained(folder / f"tokenizer{number}")
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / f"text_encoder{number}")
    return {
        f"text_encoder{number}": ["transformers", "T5EncoderModel"],
        f"tokenizer{number}": ["transformers", "T5TokenizerFast"],
    }


def with_encoders(model: Any, folder: Path) -> Path:
    """A copy of a tiny model, with text encoders whose widths are those that its denoiser takes."""
    shutil.copytree(model.folder, folder)
    torch.manual_seed(0)
    index = json.loads((folder / "model_index.json").read_text())
    if model.name == "sd":
        index |= clip(folder, "", 24)
    elif model.name == "sdxl":
        index |= clip(folder, "", 8) | clip(folder, "_2", 16, pooled=32)
    elif model.name == "flux":
        index |= clip(folder, "", 20) | t5(folder, "_2", 24)
    elif model.name == "sd3":
        index |= clip(folder, "", 8, pooled=8) | clip(folder, "_2", 12, pooled=12) | t5(folder, "_3", 24)
    else:
        index |= t5(folder, "", 24)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


LENGTHS = {"sd": 77, "sdxl": 77, "pixart": 120, "pixart (sigma)": 300, "sd3": 77 + 256, "flux": 512, "aura-flow": 256}


@pytest.mark.parametrize("name", LENGTHS)
def test_encoders_are_run_once_and_their_answer_is_kept(
    name: str, open_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = open_tiny(name)
    if name == "sdxl":  # "no text" is zeros for a model trained so, and this one was not
        folder = with_encoders(model, tmp_path / "model")
        index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
        (folder / "model_index.json").write_text(json.dumps(index))
    else:
        folder = with_encoders(model, tmp_path / "model")
    first = open_backbone(folder)
    zeros = model.backbone.prompt
    assert first.prompt["tokens"].shape[1] == LENGTHS[name]
    for key, value in first.prompt.items():
        assert value.shape[0] == 1 and (key == "mask" or value.shape[-1] == zeros[key].shape[-1])
        assert value.float().std() > 0 or key == "mask"
    assert first.identity != model.backbone.identity
    monkeypatch.setattr(prompts, "encode", lambda *args: pytest.fail("the prompt was encoded again"))
    again = open_backbone(folder)
    assert all(torch.equal(value, again.prompt[key]) for key, value in first.prompt.items())
    x_t = first.encode(torch.zeros(1, 3, 64, 64))
    with torch.inference_mode():
        assert torch.equal(first(x_t, 0.5), again(x_t, 0.5))
        assert not torch.equal(first(x_t, 0.5), model.backbone(x_t, 0.5))


def test_sdxl_takes_zeros_where_it_was_trained_with_zeros(open_tiny: Any, tmp_path: Path) -> None:
    folder = with_encoders(open_tiny("sdxl"), tmp_path / "model")
    assert not any(value.any() for value in open_backbone(folder).prompt.values())


def test_a_folder_without_text_encoders_is_used_with_zeros_said_once(
    open_tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_encoders(open_tiny("flux"), tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_2")
    backbone = open_backbone(folder)
    assert [record.message for record in caplog.records if record.name == "trace_sdk"] == [
        f"{folder} has no text_encoder_2: zeros take the place of the null prompt's embeddings."
    ]
    assert not any(value.any() for value in backbone.prompt.values())


def test_precomputed_prompt_is_taken(open_tiny: Any, tmp_path: Path) -> None:
    model = open_tiny("sd")
    shutil.copytree(model.folder, tmp_path / "model")
    tokens = torch.randn(1, 77, 24)
    save_file({"tokens": tokens}, tmp_path / "model" / prompts.PRECOMPUTED)
    assert torch.equal(open_backbone(tmp_path / "model").prompt["tokens"], tokens)
    (tmp_path / "model" / prompts.PRECOMPUTED).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="is not a null prompt"):
        open_backbone(tmp_path / "model")


def test_broken_text_encoder_says_what_to_do(open_tiny: Any, tmp_path: Path) -> None:
    folder = with_encoders(open_tiny("sd"), tmp_path / "model")
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"cannot be run.*null_prompt\.safetensors"):
        open_backbone(folder)


class Asked:
    """Stands for a pipeline whose text encoder is too large to build here: says what it was asked."""

    device = torch.device("cpu")

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, None

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = args[0]
        return self.answer


@pytest.mark.parametrize(
    ("name", "answer", "length"),
    [
        ("flux2", (torch.randn(1, 9, 24), torch.zeros(1, 9, 4)), 9),
        ("qwen-image", (torch.randn(1, 9, 24), None), 9),
        ("z-image", ([torch.randn(9, 24)], []), 9),
        ("lumina2", (torch.randn(1, 9, 24), torch.tensor([[1] * 5 + [0] * 4]), None, None), 5),
    ],
)
def test_answers_of_language_models_are_unpacked(name: str, answer: Any, length: int) -> None:
    pipeline = Asked(answer)
    prompt = families()[name].encode_prompt(pipeline, "a cat")
    assert pipeline.asked == "a cat" and prompt["tokens"].shape == (1, length, 24)
