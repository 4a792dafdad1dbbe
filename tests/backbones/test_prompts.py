"""The null prompt: by the model's own text encoders (tiny ones), once; precomputed; or zeros."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trace_sdk.backbones import prompts
from trace_sdk.backbones.registry import families, open_backbone
from trace_sdk.errors import CheckpointError

LENGTHS = {"sd": 77, "sdxl": 77, "pixart": 120, "pixart (sigma)": 300, "sd3": 77 + 256, "flux": 512, "aura-flow": 256}


@pytest.mark.parametrize("name", LENGTHS)
def test_encoders_are_run_once_and_their_answer_is_kept(
    name: str, open_tiny: Any, with_encoders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACE_CACHE", str(tmp_path / "cache"))
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


def test_sdxl_takes_zeros_where_it_was_trained_with_zeros(open_tiny: Any, with_encoders: Any, tmp_path: Path) -> None:
    folder = with_encoders(open_tiny("sdxl"), tmp_path / "model")
    assert not any(value.any() for value in open_backbone(folder).prompt.values())


def test_a_folder_without_text_encoders_is_used_with_zeros_said_once(
    open_tiny: Any, with_encoders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
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


@pytest.mark.parametrize("prompt", [{"tokens": (1, 77, 32)}, {"tokens": (2, 77, 24)}, {"pooled": (1, 24)}])
def test_a_prompt_of_another_model_is_refused(prompt: dict[str, Any], open_tiny: Any, tmp_path: Path) -> None:
    """It ended in an error of torch's at the first image."""
    shutil.copytree(open_tiny("sd").folder, tmp_path / "model")
    save_file({name: torch.zeros(shape) for name, shape in prompt.items()}, tmp_path / "model" / prompts.PRECOMPUTED)
    with pytest.raises(CheckpointError, match=r"safetensors is of another model: it has .*takes tokens \[1, 77, 24\]"):
        open_backbone(tmp_path / "model")


def test_a_prompt_is_encoded_again_when_the_index_changes(open_tiny: Any, with_encoders: Any, tmp_path: Path) -> None:
    """What was kept of SDXL did not depend on whether "no text" is zeros for it."""
    folder = with_encoders(open_tiny("sdxl"), tmp_path / "model")
    assert not any(value.any() for value in open_backbone(folder).prompt.values())
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert open_backbone(folder).prompt["tokens"].any()


def test_broken_text_encoder_says_what_to_do(open_tiny: Any, with_encoders: Any, tmp_path: Path) -> None:
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
