"""Authors' own packages as rewards, if installed: one 8-bit image at a time, without gradients.

Both packages pin versions that do not go with this project's, so they live in their own environment. Nothing here
imports transformers: this module, and the settings of the rewards, work beside whatever version such a package needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError, Scores
from rewards.frames import by_frame
from rewards.networks.hub import typed_line, weight_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


Judge = Callable[[Any, str], float]
"""``(Pillow image, prompt) -> score``."""


def hpsv2_reward(file: str, factor: float, frames: int | None = None) -> Reward:
    """``hpsv2.img_score.score`` with the weights in ``file``, times ``factor``; it chooses its device itself.

    Raises:
        RewardError: not installed, not working, or no such file.
    """

    def load() -> Judge:
        from hpsv2.img_score import score

        path = str(weight_file(file))
        return lambda image, prompt: factor * float(score(image, prompt, cp=path)[0])

    judge = _loaded("hpsv2", load)
    return Reward("hpsv2", _by_image(judge, frames), range=(-factor, factor))


def image_reward_reward(
    file: str, med_config: str, device: torch.device | str = "cpu", frames: int | None = None
) -> Reward:
    """``ImageReward.load(file).score``.

    Raises:
        RewardError: not installed, not working, or no such file.
    """

    def load() -> Judge:
        import ImageReward

        model = ImageReward.load(str(weight_file(file)), device=str(device), med_config=str(weight_file(med_config)))

        def judge(image: Any, prompt: str) -> float:
            with torch.no_grad():
                return float(model.score(prompt, image))

        return judge

    return Reward("image_reward", _by_image(_loaded("image-reward", load), frames))


def _loaded(package: str, load: Callable[[], Judge]) -> Judge:
    remedy = f"it needs its own environment (extra {package}, see docs/rewards.md), or backend: native"
    try:
        return load()
    except RewardError:
        raise
    except ImportError as error:
        raise RewardError(f"the package {package} cannot be imported here ({typed_line(error)}); {remedy}") from error
    except Exception as error:  # whatever the package makes of files and versions it does not like
        raise RewardError(f"the package {package} does not load: {typed_line(error)}; {remedy}") from error


def _by_image(judge: Judge, frames: int | None) -> Callable[..., Scores]:
    """Score image by image; what raises is NaN with the package's own words."""
    from PIL import Image

    def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
        reasons: dict[int, str] = {}

        def score(images: Tensor, samples: Tensor) -> Tensor:
            sample = int(samples[0])
            pixels = (images[0].float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
            try:
                return torch.tensor([judge(Image.fromarray(pixels.cpu().numpy()), prompts[sample])])
            except Exception as error:  # one image's failure is not the others'
                reasons[sample] = typed_line(error)
                return torch.tensor([torch.nan])

        return Scores(by_frame(media.detach(), score, 1, frames), reasons)

    return function
