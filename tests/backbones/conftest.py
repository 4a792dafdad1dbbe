"""Tiny models of every family, built from the real diffusers classes and saved as a user would have it on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from trace_sdk.backbones.backbone import Backbone
from trace_sdk.backbones.registry import open_backbone

Save = Callable[[Path], None]


class Tiny(NamedTuple):
    """How to save it, and what is then true of it: grids of its blocks for an image of 96×128 px, and their heads."""

    save: Save
    grids: list[tuple[int, int]]
    heads: int


def vae(channels: int, levels: int = 3, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        **more,
    )


def flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def save(folder: Path, pipeline: str, *, safe: bool = True, **parts: Any) -> None:
    """Write a pipeline without text encoders; those that its class asks for are null in model_index.json."""
    torch.manual_seed(0)
    made = {name: make() if callable(make) else make for name, make in parts.items()}
    denoiser = made.get("transformer", made.get("unet"))
    with torch.no_grad():
        for name, value in denoiser.named_parameters():
            if value.ndim > 1 and "pos_embed" not in name:  # peaky enough attention, and no zero-initialised layer
                value.normal_(std=1.5 * value[0].numel() ** -0.5)
    kind = getattr(diffusers, pipeline)
    absent = {name: None for name in kind._get_signature_keys(kind)[0] if name not in made}
    if pipeline == "StableDiffusionPipeline":
        absent["requires_safety_checker"] = False
    kind(**made, **absent).save_pretrained(folder, safe_serialization=safe)


def unet(**more: Any) -> Any:
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**settings | more)


def sd(folder: Path) -> None:
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    save(folder, "StableDiffusionPipeline", unet=unet, vae=lambda: vae(4), scheduler=scheduler)


def sd_v(folder: Path) -> None:
    """As SD 2.1: v-prediction, linear projections, heads by their width."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        steps_offset=1, clip_sample=False,
    )  # fmt: skip
    made = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    save(folder, "StableDiffusionPipeline", unet=lambda: unet(**made), vae=lambda: vae(4), scheduler=scheduler)


def sdxl(folder: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    made = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    save(folder, "StableDiffusionXLPipeline", unet=lambda: unet(**made), vae=lambda: vae(4, 2), scheduler=scheduler)


def pixart(folder: Path, pipeline: str = "PixArtAlphaPipeline", sample_size: int = 128) -> None:
    def transformer() -> Any:
        return diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2,
            cross_attention_dim=48, sample_size=sample_size, caption_channels=24,
        )  # fmt: skip

    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear")
    save(folder, pipeline, transformer=transformer, vae=lambda: vae(4), scheduler=scheduler)


def sd3(folder: Path, **more: Any) -> None:
    def transformer() -> Any:
        return diffusers.SD3Transformer2DModel(
            sample_size=32, in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=32,
            qk_norm="rms_norm", **more,
        )  # fmt: skip

    autoencoder = lambda: vae(16, scaling_factor=1.5305, shift_factor=0.0609)  # noqa: E731
    save(folder, "StableDiffusion3Pipeline", transformer=transformer, vae=autoencoder, scheduler=flow)


def flux(folder: Path, guidance: bool = True) -> None:
    def transformer() -> Any:
        return diffusers.FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip

    autoencoder = lambda: vae(16, scaling_factor=0.3611, shift_factor=0.1159)  # noqa: E731
    save(folder, "FluxPipeline", transformer=transformer, vae=autoencoder, scheduler=flow)


def flux2(folder: Path) -> None:
    def transformer() -> Any:
        return diffusers.Flux2Transformer2DModel(
            in_channels=32, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        )  # fmt: skip

    def autoencoder() -> Any:
        made = diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=8, norm_num_groups=2,
        )  # fmt: skip
        made.bn.running_mean.normal_(std=0.1)
        made.bn.running_var.uniform_(0.5, 2.0)
        return made

    save(folder, "Flux2Pipeline", transformer=transformer, vae=autoencoder, scheduler=flow)


def qwen_image(folder: Path) -> None:
    def transformer() -> Any:
        return diffusers.QwenImageTransformer2DModel(
            in_channels=32, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip

    def autoencoder() -> Any:
        return diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1] * 8, latents_std=[0.5] * 8,
        )  # fmt: skip

    save(folder, "QwenImagePipeline", transformer=transformer, vae=autoencoder, scheduler=flow)


def z_image(folder: Path) -> None:
    def transformer() -> Any:
        return diffusers.ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
            axes_dims=[4, 6, 6], axes_lens=[128, 64, 64],
        )  # fmt: skip

    autoencoder = lambda: vae(16, scaling_factor=0.3611, shift_factor=0.1159)  # noqa: E731
    save(folder, "ZImagePipeline", transformer=transformer, vae=autoencoder, scheduler=flow)


def lumina2(folder: Path) -> None:
    def transformer() -> Any:
        return diffusers.Lumina2Transformer2DModel(
            in_channels=16, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
            multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(512, 64, 64), cap_feat_dim=24,
        )  # fmt: skip

    autoencoder = lambda: vae(16, scaling_factor=0.3611, shift_factor=0.1159)  # noqa: E731
    save(folder, "Lumina2Pipeline", transformer=transformer, vae=autoencoder, scheduler=flow)


def aura_flow(folder: Path) -> None:
    def transformer() -> Any:
        return diffusers.AuraFlowTransformer2DModel(
            sample_size=32, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32,
            pos_embed_max_size=1024,
        )  # fmt: skip

    save(folder, "AuraFlowPipeline", transformer=transformer, vae=lambda: vae(4), scheduler=flow)


TOKENS = (12, 16)  # of 8 px: a VAE of 4 px and patches of 2×2
DIT = [TOKENS] * 3

# An SD UNet calls the blocks on the way down, in the middle, and on the way up.
TINY: dict[str, Tiny] = {
    "sd": Tiny(sd, [(24, 32), (12, 16), (12, 16), (12, 16), (12, 16), (24, 32), (24, 32)], 14),
    "sd (v)": Tiny(sd_v, [(24, 32), (12, 16), (12, 16), (12, 16), (12, 16), (24, 32), (24, 32)], 22),
    "sdxl": Tiny(
        sdxl,
        [(24, 32), (12, 16), (12, 16), (12, 16), (12, 16), (12, 16), (12, 16), (12, 16), (12, 16), (24, 32), (24, 32)],
        38,
    ),
    "pixart": Tiny(pixart, [TOKENS] * 2, 4),
    "pixart (sigma)": Tiny(lambda folder: pixart(folder, "PixArtSigmaPipeline", 32), [TOKENS] * 2, 4),
    "sd3": Tiny(sd3, DIT, 6),
    "sd3 (3.5 medium)": Tiny(lambda folder: sd3(folder, dual_attention_layers=(0, 1)), [TOKENS] * 5, 10),
    "flux": Tiny(flux, DIT, 6),
    "flux (schnell)": Tiny(lambda folder: flux(folder, guidance=False), DIT, 6),
    "flux2": Tiny(flux2, DIT, 6),
    "qwen-image": Tiny(qwen_image, [TOKENS] * 2, 4),
    "z-image": Tiny(z_image, DIT, 6),
    "lumina2": Tiny(lumina2, DIT, 6),
    "aura-flow": Tiny(aura_flow, DIT, 6),
}


class Model(NamedTuple):
    """A tiny model that was saved and opened again."""

    name: str
    folder: Path
    backbone: Backbone
    tiny: Tiny


OpenTiny = Callable[[str], Model]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Null prompts are not kept where the user's are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> OpenTiny:
    """`open_tiny(name)`: one of TINY, made once; its folder is not to be changed."""
    root, made = tmp_path_factory.mktemp("tiny"), {}

    def model(name: str) -> Model:
        if name not in made:
            TINY[name].save(root / name)
            made[name] = Model(name, root / name, open_backbone(root / name), TINY[name])
        return made[name]

    return model


@pytest.fixture
def copy(open_tiny: OpenTiny, tmp_path: Path) -> Callable[[str], Path]:
    """`copy(name)`: the folder of a tiny model, to be changed."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(open_tiny(name).folder, tmp_path / "model"))

    return make


@pytest.fixture(scope="session", params=TINY)
def model(request: pytest.FixtureRequest, open_tiny: OpenTiny) -> Model:
    """Every tiny model in turn."""
    return open_tiny(request.param)


@pytest.fixture
def tiny_names() -> list[str]:
    """Names of all tiny models."""
    return list(TINY)


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


def language_model(folder: Path, family: str) -> dict[str, Any]:
    """A language model as the newer families have it, on a tokenizer of single bytes with a chat template."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12,
    }  # fmt: skip
    more: dict[str, Any] = {}
    if family == "qwen-image":
        vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 24, "intermediate_size": 8}
        rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
        kind: Any = Qwen2_5_VLForConditionalGeneration
        config: Any = Qwen2_5_VLConfig(text_config=sizes | {"rope_parameters": rope}, vision_config=vision)
    elif family == "lumina2":
        kind, config = Gemma2Model, Gemma2Config(**sizes)
    elif family == "flux2":  # klein: layers 9, 18 and 27 side by side
        kind, config = Qwen3ForCausalLM, Qwen3Config(**sizes | {"hidden_size": 8, "num_hidden_layers": 28})
        more["_class_name"] = "Flux2KleinPipeline"
    else:
        kind, config = Qwen3Model, Qwen3Config(**sizes)
    kind(config).save_pretrained(folder / "text_encoder")
    more["text_encoder"] = ["transformers", kind.__name__]
    return more | {"tokenizer": ["transformers", "Qwen2Tokenizer"]}


@pytest.fixture(scope="session")
def with_encoders() -> Callable[[Any, Path], Path]:
    """`with_encoders(model, folder)`: a copy of a tiny model, with text encoders of the widths its denoiser takes."""
    return copy_with_encoders


def copy_with_encoders(model: Any, folder: Path) -> Path:
    shutil.copytree(model.folder, folder)
    torch.manual_seed(0)
    index = json.loads((folder / "model_index.json").read_text())
    if model.name == "sd":
        index |= clip(folder, "", 24)
    elif model.name == "sdxl":
        index |= clip(folder, "", 8) | clip(folder, "_2", 16, pooled=32)
    elif model.name == "flux":
        index |= clip(folder, "", 20) | t5(folder, "_2", 24)
    elif model.name in ("z-image", "qwen-image", "lumina2", "flux2"):
        index |= language_model(folder, model.name)
    elif model.name == "sd3":
        index |= clip(folder, "", 8, pooled=8) | clip(folder, "_2", 12, pooled=12) | t5(folder, "_3", 24)
    else:
        index |= t5(folder, "", 24)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
