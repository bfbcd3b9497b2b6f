"""Qwen-Image-Edit-Plus (2509, 2511): ``QwenImageEditPlusPipeline``, with one source image per prompt."""

from __future__ import annotations

from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, VAE_IMAGE_SIZE

from generators.adapters.qwen_image_edit import QwenImageEdit


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit with a smaller image for the text encoder, named "Picture 1" before the prompt."""

    pipeline_class = "QwenImageEditPlusPipeline"
    seen_area, source_area = CONDITION_IMAGE_SIZE, VAE_IMAGE_SIZE
