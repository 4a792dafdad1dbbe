"""A latent diffusion model as diffusers stores it: VAE, denoiser, noising rule and null prompt.

A family is a subclass in `families/`: what its denoiser is called with, and where the image lies in its attention.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_sdk.atomic import write_text
from trace_sdk.backbones.backbone import OnAttention, check_size
from trace_sdk.backbones.checkpoint import (
    refuse_missing,
    refuse_pickle,
    sha256_of_folder,
    unreadable,
    write_tensors,
    write_weights,
)
from trace_sdk.backbones.device import Placed, torch_dtype
from trace_sdk.backbones.noising import noising_of
from trace_sdk.backbones.prompts import PRECOMPUTED, Prompt, null_prompt
from trace_sdk.backbones.quiet import quiet
from trace_sdk.backbones.tap import AttentionCalls, SelfAttentionTap
from trace_sdk.errors import ArgumentError, CheckpointError, OutOfMemoryError

LEAST_TOKENS = 8  # a side, below which ABDiv says nothing
TILED_FROM = 1024  # pixels: the VAE reads larger images in tiles
WEIGHTS = "diffusion_pytorch_model"


class LatentBackbone(Placed):
    """One family of latent diffusion models; see `Backbone` for what it does.

    Class attributes, to be set by the family:
        family: its name.
        architecture: diffusers class of the denoiser, by which model_index.json chooses the family.
        part: folder of the denoiser.
        vaes: diffusers classes of its VAE.
        self_attention: regular expression for the names of the modules that attend among image tokens.
        image_first: image tokens come before the text's in joint attention, else after them.
        cross_attention: regular expression for the modules in which the image looks at the text, where these are not
            those of self-attention.
        words: tokenizer of the prompt → where the first of its tokens lies among the prompt's `tokens`.
        drops_padding: the prompt's `tokens` are without the tokenizer's padding.
        no_graph: why a student of it cannot be exported; empty if it can.
    """

    family: ClassVar[str]
    architecture: ClassVar[str]
    part: ClassVar[str] = "transformer"
    vaes: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)
    self_attention: ClassVar[str]
    image_first: ClassVar[bool] = False
    cross_attention: ClassVar[str | None] = None
    words: ClassVar[dict[str, int]] = {"tokenizer": 0}
    drops_padding: ClassVar[bool] = False
    offloaded = False  # the denoiser's weights come to the device layer by layer
    no_graph: ClassVar[str] = ""
    denoiser: Any
    vae: Any

    def __init__(self, denoiser: Any, vae: Any, scheduler: dict[str, Any], prompt: Prompt, identity: str) -> None:
        """`scheduler` is its scheduler_config.json."""
        super().__init__()
        self.denoiser, self.vae, self.identity = denoiser, vae, identity
        self._scheduler, self.noising = scheduler, noising_of(scheduler)
        self._prompt_names = tuple(prompt)
        for name, value in prompt.items():
            self.register_buffer(f"prompt_{name}", value, persistent=False)
        self.attending = self._named(self.self_attention)
        if not self.attending:
            raise CheckpointError(
                f"This {self.family} model has no self-attention that is read here ({self.self_attention}). Give "
                "another one."
            )
        self._calls = AttentionCalls(self.attending.values())
        cross = self.cross_attention
        self.calls_on_text = AttentionCalls(self._named(cross).values()) if cross else self._calls
        if self.in_channels != self.latent_channels:
            raise CheckpointError(
                f"This {self.family} model takes {self.in_channels} channels, its VAE gives {self.latent_channels}: "
                "a variant for inpainting or control. Give the text-to-image one."
            )

    def _named(self, pattern: str) -> dict[str, Any]:
        """The denoiser's modules of such names."""
        named = re.compile(pattern)
        return {name: module for name, module in self.denoiser.named_modules() if named.search(name)}

    @classmethod
    def matches(cls, config: dict[str, Any]) -> bool:
        """Whether a denoiser of this architecture with this config.json is of the family."""
        return True

    @classmethod
    @abstractmethod
    def zero_prompt(cls, config: dict[str, Any]) -> Prompt:
        """Zeros in the place of the text encoders' answer, batch of 1, from the denoiser's config.json."""

    @classmethod
    @abstractmethod
    def encode_prompt(cls, pipeline: Any, prompt: str) -> Prompt:
        """The text encoders' answer, batch of 1, by the model's own diffusers pipeline."""

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """The denoiser's answer to X_t [B, C, h, w] and t [B], all in the denoiser's dtype, of the shape of X_t."""

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str, precision: str, offload: bool) -> Self:
        """Read a diffusers folder: denoiser in `precision`, the VAE's encoder in fp32.

        Raises:
            CheckpointError: a part is missing, corrupt, pickled or of another kind.
            OutOfMemoryError: the weights don't fit.
        """
        import diffusers

        dtype, device = torch_dtype(precision), torch.device(device)
        config, vae_config = read_config(folder, cls.part), read_config(folder, "vae")
        name = vae_config.get("_class_name")
        if name not in cls.vaes:
            raise CheckpointError(f"{folder / 'vae'} is a {name}; {cls.family} takes {' or '.join(cls.vaes)}.")
        for part in (cls.part, "vae"):
            refuse_pickle(folder / part)
        scheduler = read_config(folder, "scheduler", "scheduler_config.json")
        noising_of(scheduler)  # what is wrong with it is said before gigabytes are read
        # Text encoders come and go before the denoiser needs the memory.
        prompt = null_prompt(cls, folder, config, torch.device("cpu") if offload else device, dtype)
        vae = read_part(getattr(diffusers, name), folder / "vae", torch.float32, unused="decoder.")
        vae.decoder = nn.Identity()  # half of the weights, and not in a student's folder
        vae.enable_slicing()
        denoiser = read_part(getattr(diffusers, cls.architecture), folder / cls.part, dtype)
        backbone = cls(denoiser, vae, scheduler, prompt, identity_of(folder, cls.part, prompt))
        backbone.eval().requires_grad_(False)
        failure = None
        try:
            if offload:
                backbone.offloaded = True
                backbone.vae.to(device)
                for buffer in backbone.buffers(recurse=False):
                    buffer.data = buffer.data.to(device)
                denoiser.enable_group_offload(
                    onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level",
                    use_stream=device.type == "cuda",
                )  # fmt: skip
            else:
                backbone.to(device)
        except torch.OutOfMemoryError as error:
            failure = str(error).partition(".")[0]
        if failure:
            size = sum(value.numel() * value.element_size() for value in denoiser.parameters())
            raise OutOfMemoryError(
                f"The {cls.family} denoiser takes {size / 2**30:.1f} GiB as {precision}, more than {device} has free. "
                "Give --precision bf16, or --offload, which keeps the weights in the computer's memory."
            )
        return backbone

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads: fp16 weights, of the VAE its encoder alone, and the null prompt."""
        folder = Path(folder)
        for name, model in ((self.part, self.denoiser), ("vae", self.vae)):
            write_weights(folder / name / f"{WEIGHTS}.safetensors", model.state_dict())
            write_text(folder / name / "config.json", model.to_json_string())
        write_text(folder / "scheduler/scheduler_config.json", json.dumps(self._scheduler, indent=2) + "\n")
        write_tensors(folder / PRECOMPUTED, self.prompt)
        parts = {self.part: self.architecture, "vae": type(self.vae).__name__}
        index = {"_class_name": "DiffusionPipeline", **{name: ["diffusers", kind] for name, kind in parts.items()}}
        write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")

    @property
    def in_channels(self) -> int:
        """Channels that the denoiser takes."""
        return int(self.denoiser.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of X_0."""
        return int(self.vae.config.latent_channels)

    @property
    def latent_side(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def cells_per_token(self) -> int:
        """Side of a token of the finest self-attention in cells of X_t."""
        return int(self.denoiser.config.patch_size)

    @property
    def token_side(self) -> int:
        return self.latent_side * self.cells_per_token

    @property
    def multiple_of(self) -> int:
        return self.token_side

    @property
    def min_size(self) -> int:
        return -(-LEAST_TOKENS * self.token_side // self.multiple_of) * self.multiple_of

    @property
    def native_size(self) -> int:
        """Side of the images that it was made for, pixels: 1024 where its configuration doesn't say."""
        cells = self.denoiser.config.get("sample_size")
        size = cells * self.latent_side if isinstance(cells, int) else 1024
        return size if self.most_tokens is None else min(size, self.most_tokens * self.token_side)

    @property
    def most_tokens(self) -> int | None:
        """Longest side of an image in tokens, where the model has learnt positions; None for any."""
        return None

    @property
    def self_attention_blocks(self) -> int:
        return len(self.attending)

    @property
    def total_heads(self) -> int:
        return sum(int(module.heads) for module in self.attending.values())

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.vae.parameters()).device  # the denoiser's may be elsewhere, offloaded
        return found

    @property
    def prompt(self) -> Prompt:
        """The null prompt's embeddings, batch of 1, by name."""
        return {name: getattr(self, f"prompt_{name}") for name in self._prompt_names}

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.token_side, size[1] // self.token_side

    def encode(self, images: Tensor) -> Tensor:
        """Images → X_0: the VAE's mean, scaled as the denoiser was trained; in fp32 as loaded, which it may need."""
        if not torch.compiler.is_exporting():
            check_size(self, images)
            self.vae.use_tiling = max(images.shape[-2:]) > TILED_FROM
        with torch.autocast(images.device.type, enabled=False):
            return self.scale(self.posterior_mean(images.to(next(self.vae.parameters()).dtype)).float())

    def posterior_mean(self, images: Tensor) -> Tensor:
        """The VAE's answer, before scaling."""
        mean: Tensor = self.vae.encode(images).latent_dist.mode()
        return mean

    def scale(self, latents: Tensor) -> Tensor:
        """The VAE's answer → X_0."""
        config = self.vae.config
        factor = config.get("scaling_factor", 1.0)
        if config.get("latents_mean"):  # by channel
            mean, deviation = (
                latents.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
            )
            by_channel: Tensor = (latents - mean) * factor / deviation
            return by_channel
        scaled: Tensor = (latents - (config.get("shift_factor") or 0.0)) * factor
        return scaled

    @contextmanager
    def as_graph(self) -> Iterator[None]:
        """While it is traced for an export: what would bind the graph to one batch or size is put aside."""
        self.vae.disable_slicing()  # a loop over the batch
        try:
            yield
        finally:
            self.vae.enable_slicing()

    def image_tokens(self, queries: int, latents: tuple[int, int]) -> tuple[slice, tuple[int, int]]:
        """Where the image's tokens lie in a call of so many queries, and their grid, for X_t of that size."""
        grid = latents[0] // self.cells_per_token, latents[1] // self.cells_per_token
        count = grid[0] * grid[1]
        return slice(0, count) if self.image_first else slice(queries - count, queries), grid

    def text_tokens(self, image: int, text: int, keys: int) -> slice | None:
        """Where the text's tokens lie among the keys of a call by so many image tokens; None if they aren't there."""
        if self.cross_attention:
            return slice(0, text)
        if keys < image + text:
            return None
        return slice(image, image + text) if self.image_first else slice(keys - image - text, keys - image)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | float,
        on_attention: OnAttention | None = None,
        *,
        share_softmax: bool = False,
        prompt: Prompt | None = None,
    ) -> Tensor:
        """As `Backbone` says, with the null prompt unless another one's embeddings, batch of 1, are given."""
        batch, (height, width) = x_t.shape[0], x_t.shape[-2:]
        if not torch.compiler.is_exporting():
            self._check_positions(height * self.latent_side, width * self.latent_side)
        times = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(batch)
        given = {
            name: value.to(x_t.device, self.dtype if value.is_floating_point() else value.dtype).expand(
                batch, *value.shape[1:]
            )
            for name, value in (prompt or self.prompt).items()
        }
        tap: AbstractContextManager[object] = nullcontext()
        if on_attention is not None:
            tap = SelfAttentionTap(
                on_attention,
                lambda queries, keys: self.image_tokens(queries, (height, width)),
                self._calls,
                share_softmax=share_softmax,
            )
        with tap:
            return self.denoise(x_t.to(self.dtype), times, given).float()

    def _check_positions(self, height: int, width: int) -> None:
        """Of what the denoiser sees, which may be a window of the image that was encoded."""
        most = self.most_tokens
        if most is not None and max(height, width) > most * self.token_side:
            raise ArgumentError(
                f"{self.family} has learnt positions up to {most * self.token_side} px; got {height}×{width}. "
                "Lower --size, or read the image in windows (--tile)."
            )


def numbers(like: Tensor, *values: float) -> Tensor:
    """Numbers, which may be those of a size that a graph leaves open, for each of a batch: [B, count]."""
    return torch.cat([like.new_full((like.shape[0], 1), value) for value in values], 1)


def pack(x_t: Tensor) -> Tensor:
    """Latents [B, C, h, w] → tokens of 2×2 cells [B, h·w/4, 4C], row by row, as the FLUX models take them."""
    return F.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, latents: tuple[int, int]) -> Tensor:
    """What `pack` did, undone, for latents of that size."""
    return F.pixel_shuffle(tokens.mT.reshape(tokens.shape[0], -1, latents[0] // 2, latents[1] // 2), 2)


def read_config(folder: Path, part: str, file: str = "config.json") -> dict[str, Any]:
    """A part's configuration. Raises CheckpointError if it isn't there or isn't JSON."""
    path = folder / part / file
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {part}/{file}, which this model needs. Give a whole diffusers folder "
            "(pipeline.save_pretrained writes one)."
        )
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a diffusers config.")
    return config


def read_part(architecture: Any, folder: Path, dtype: torch.dtype, *, unused: str | None = None) -> Any:
    """A model from its folder, whole or in shards; of several variants the one without a name, else fp16, else bf16.

    Raises CheckpointError, also if weights are missing, except those whose names start with `unused`.
    """
    variant = next((v for v in (None, "fp16", "bf16") if has_variant(folder, v)), None)
    try:
        with quiet():  # it would only warn of missing weights, and go on with random ones
            model, found = architecture.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, variant=variant, output_loading_info=True
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds, one meaning
        raise unreadable(folder, error) from error
    refuse_missing(folder, [name for name in found["missing_keys"] if unused is None or not name.startswith(unused)])
    return model


def has_variant(folder: Path, variant: str | None) -> bool:
    """Whether a part has weights of this variant, whole or the index of its shards."""
    dotted = f".{variant}" if variant else ""
    names = f"{WEIGHTS}{dotted}.safetensors", f"{WEIGHTS}.safetensors.index{dotted}.json"
    return any((folder / name).is_file() for name in names)


def identity_of(folder: Path, part: str, prompt: Prompt) -> str:
    """sha256 over the denoiser's and the VAE's weights and the null prompt."""
    digest = hashlib.sha256()
    for name in (part, "vae"):
        digest.update(sha256_of_folder(folder / name).encode())
    for name, value in sorted(prompt.items()):
        digest.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
