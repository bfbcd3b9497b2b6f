"""Backbone and head together, for training and for loading a reward folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.base import RewardError
from rewards.networks.clip import Clip
from rewards.networks.state_dicts import check_keys
from rewards.training.heads import Head
from rewards.training.settings import AnyBackbone, Backbone

ATTENTION = ["q_proj", "v_proj"]


def load_backbone(settings: Backbone, device: torch.device | str, dtype: str = "float32") -> Clip:
    """The frozen CLIP; raises RewardError."""
    return Clip.load(settings.model, settings.processor, dtype, device, quick_gelu=settings.quick_gelu)


class Scorer:
    """Images or videos and prompts -> outputs of the head ``[N, K]``, with gradients.

    A video's features are the mean of its frames', at unit length. :class:`rewards.training.vlm.VLMScorer` has the same
    methods around a vision-language model.
    """

    fixed_text = True
    """Whether features of prompts stay as they are while the backbone is trained."""

    def __init__(self, clip: Clip, head: Head | None = None) -> None:
        self.clip = clip
        if head is not None:
            self.head = head

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.clip.model.device

    @property
    def width(self) -> int:
        """D of the features."""
        return int(self.clip.model.config.projection_dim)

    # -- features -----------------------------------------------------------------------------------------------

    def text(self, prompts: Sequence[str], chunk: int) -> Tensor:
        """Unit features ``[N, D]`` of prompts."""
        return self.clip.text_features(list(prompts), chunk)

    def embed(self, media: Sequence[Tensor], prompts: Sequence[str], chunk: int) -> Tensor:
        """Unit features ``[N, D]`` float32 of N images ``[3, H, W]`` or videos ``[F, 3, H, W]`` in [0, 1], of any size.

        Args:
            prompts: their N prompts, which do not count here.
        """
        pixels = [self.clip.preprocess((one if one.ndim == 4 else one[None]).to(self.device)) for one in media]
        parts = torch.cat(pixels).split(chunk)
        seen = torch.cat([self.clip.pixel_features(part) for part in parts]).split([len(one) for one in pixels])
        return F.normalize(torch.stack([frames.mean(0) for frames in seen]), dim=-1)

    def read(self, media: Tensor, prompts: list[str], chunk: int) -> tuple[Tensor, Tensor]:
        """Unit features ``[N, D]`` of media ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` and of their prompts."""
        return self.embed(list(media), prompts, chunk), self.text(prompts, chunk)

    def refused(self, media: Tensor, prompts: Sequence[str]) -> dict[int, str]:
        """Sample -> why it cannot be read."""
        return {}

    def outputs(self, image: Tensor, text: Tensor, user: int | Tensor | None) -> Tensor:
        """``[N, K]`` of features.

        Args:
            user: number of a known user, ``[1, ...]`` of a newcomer, or None for nobody in particular.
        """
        if isinstance(user, int):
            user = torch.tensor([user], device=image.device)
        return self.head(image, text, None if user is None else user.expand(len(image), *user.shape[1:]))

    # -- weights ------------------------------------------------------------------------------------------------

    def open(self, settings: AnyBackbone, seed: int) -> list[torch.nn.Parameter]:
        """Make the parameters that ``tune`` selects trainable; returns them."""
        assert isinstance(settings, Backbone)
        self.start = plain_state(self.clip) if settings.tune != "none" else {}
        tower = self.clip.model.vision_model
        if settings.tune == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            with torch.random.fork_rng():
                torch.manual_seed(seed)
                inject_adapter_in_model(
                    LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=ATTENTION), tower
                )
        elif settings.tune == "last":
            layers = tower.encoder.layers
            if settings.layers > len(layers):
                raise RewardError(
                    f"backbone.layers: {settings.layers} is more than the {len(layers)} layers of the vision tower"
                )
            for part in (*layers[-settings.layers :], tower.post_layernorm, self.clip.model.visual_projection):
                part.requires_grad_(True)
        return [parameter for parameter in self.clip.model.parameters() if parameter.requires_grad]

    def changed(self) -> dict[str, Tensor]:
        """Weights of the backbone for a reward folder: those that have changed since it was opened."""
        after = plain_state(self.clip) if self.start else {}
        return {name: value for name, value in after.items() if not torch.equal(value, self.start[name])}

    def take(self, settings: AnyBackbone, state: Mapping[str, Tensor], where: str) -> None:
        """Put :meth:`changed` of a folder into the backbone; RewardError if it does not fit."""
        if settings.tune == "none":
            return
        model, own = self.clip.model, self.clip.model.state_dict()
        check_keys({**own, **state}, own, where, "of this backbone")
        model.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()}, strict=False)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of backbone and head, for a digest."""
        return {**self.clip.model.state_dict(), **self.head.state_dict()}


def plain_state(clip: Clip) -> dict[str, Tensor]:
    """The vision side's weights under their own names, a LoRA merged into them."""
    merged: dict[str, Tensor] = {}
    for name, module in clip.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.base_layer.weight
            merged[f"{name}.weight"] = (base + module.get_delta_weight("default").to(base.dtype)).detach().clone()
    state = {name.replace(".base_layer", ""): value for name, value in clip.model.state_dict().items()}
    kept = {name: value for name, value in state.items() if "lora_" not in name and name.startswith("vis")}
    return {**{name: value.detach().clone() for name, value in kept.items()}, **merged}
