"""A backbone's answer beside that of the model's own diffusers pipeline, which packs and conditions by its own code."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from trace_sdk.backbones.noising import Diffusion
from trace_sdk.backbones.registry import open_backbone

HEIGHT, WIDTH = 96, 128

# What each pipeline calls the null prompt's embeddings, and what keeps it from adding to them.
CALLS: dict[str, dict[str, Any]] = {
    "sd": {"guidance_scale": 1.0},
    "sd (v)": {"guidance_scale": 1.0},
    "sdxl": {"guidance_scale": 1.0},
    "pixart": {"guidance_scale": 1.0, "negative_prompt": None, "use_resolution_binning": False},
    "pixart (sigma)": {"guidance_scale": 1.0, "negative_prompt": None, "use_resolution_binning": False},
    "sd3": {"guidance_scale": 1.0},
    "sd3 (3.5 medium)": {"guidance_scale": 1.0},
    "flux": {"guidance_scale": 1.0},
    "flux (schnell)": {},
    "flux2": {"guidance_scale": 1.0},
    "qwen-image": {"true_cfg_scale": 1.0},
    "z-image": {"guidance_scale": 0.0},
    "lumina2": {"guidance_scale": 1.0},
    "aura-flow": {"guidance_scale": 1.0},
}


def embeddings(name: str, prompt: dict[str, Tensor]) -> dict[str, Any]:
    """The null prompt under the names of the pipeline's arguments."""
    tokens = prompt["tokens"]
    if name == "z-image":
        return {"prompt_embeds": [tokens[0]]}
    given: dict[str, Any] = {"prompt_embeds": tokens}
    if "pooled" in prompt:
        given["pooled_prompt_embeds"] = prompt["pooled"]
    if name.startswith(("pixart", "aura-flow", "lumina2")):
        given["prompt_attention_mask"] = prompt.get("mask", torch.ones(tokens.shape[:2], dtype=torch.long))
    if name == "qwen-image":
        given["prompt_embeds_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long)
    return given


def test_answer_is_that_of_the_models_own_pipeline(model: Any) -> None:
    """The first step of the pipeline on random latents, and the backbone at the same t."""
    index = json.loads((model.folder / "model_index.json").read_text())
    absent = {name: None for name, kind in index.items() if kind == [None, None]}
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(model.folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    backbone = open_backbone(model.folder)
    # A strong prompt: what comes from it must come from it in both.
    tokens = backbone.prompt["tokens"]
    tokens.copy_(torch.randn(tokens.shape, generator=torch.Generator().manual_seed(4)))
    shape = backbone.encode(torch.zeros(1, 3, HEIGHT, WIDTH)).shape
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    answers: list[Tensor] = []
    asked: list[tuple[Tensor, float]] = []
    denoiser = pipeline.unet if model.name.startswith("sd") and "3" not in model.name else pipeline.transformer

    def before(module: Any, args: Any, kwargs: Any) -> None:
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        asked.append((args[0] if args else kwargs["hidden_states"], float(torch.as_tensor(time).flatten()[0])))

    denoiser.register_forward_pre_hook(before, with_kwargs=True)
    denoiser.register_forward_hook(lambda module, args, answer: answers.append(answer[0]))
    latents = x_t
    if model.name.startswith(("flux (", "qwen")) or model.name == "flux":
        latents = type(pipeline)._pack_latents(x_t, 1, shape[1], shape[2], shape[3])
    with torch.inference_mode():
        pipeline(
            height=HEIGHT, width=WIDTH, num_inference_steps=2, latents=latents, output_type="latent",
            **embeddings(model.name, backbone.prompt), **CALLS[model.name],
        )  # fmt: skip
    answer, (given, time) = answers[0], asked[0]
    if model.name == "z-image":
        answer = torch.stack(answer)[:, :, 0]
    if model.name.startswith("flux2"):
        answer = answer.transpose(1, 2).unflatten(2, shape[-2:])
    elif latents is not x_t:
        answer = type(pipeline)._unpack_latents(answer, HEIGHT, WIDTH, backbone.latent_side).flatten(1, -3)
    if model.name in ("z-image", "lumina2"):  # these run from noise to image
        answer, time = -answer, 1 - time
    elif isinstance(backbone.noising, Diffusion):  # its samplers scale the noise that they begin with
        x_t, time = given, time / backbone.noising.steps
    elif time > 1:
        time /= backbone.noising.steps
    with torch.inference_mode():
        ours = backbone(x_t, time)
    torch.testing.assert_close(ours, answer[:, : shape[1]], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["flux", "qwen-image", "flux2"])
def test_latents_are_what_the_pipeline_would_encode(name: str, open_tiny: Any) -> None:
    """X_0 of an image, by the code of diffusers' image-to-image pipelines."""
    model = open_tiny(name)
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(6)) * 2 - 1
    part = {"flux": "FluxImg2ImgPipeline", "qwen-image": "QwenImageImg2ImgPipeline", "flux2": "Flux2Pipeline"}[name]
    kind = getattr(diffusers, part)
    vae = getattr(diffusers, model.backbone.vaes[0]).from_pretrained(model.folder / "vae")
    pipeline = object.__new__(kind)
    object.__setattr__(pipeline, "vae", vae)
    with torch.inference_mode():
        expected = encode_by_pipeline(name, pipeline, vae, image)
        torch.testing.assert_close(model.backbone.encode(image), expected, atol=1e-5, rtol=1e-4)


def encode_by_pipeline(name: str, pipeline: Any, vae: Any, image: Tensor) -> Tensor:
    """The pipeline's own normalisation of the VAE's mean (its sampling would add noise)."""
    if name == "flux2":
        encoded: Tensor = pipeline._encode_vae_image(image, None)
        return encoded
    mean = vae.encode(image[:, :, None] if name == "qwen-image" else image).latent_dist.mode()
    if name == "flux":
        return (mean - vae.config.shift_factor) * vae.config.scaling_factor
    shift, width = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return ((mean - shift) / width)[:, :, 0]
