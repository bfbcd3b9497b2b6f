"""FLUX.2 klein: ``Flux2KleinPipeline``."""

from __future__ import annotations

from generators.adapters.flux2 import Flux2


class Flux2Klein(Flux2):
    """FLUX.2 with a Qwen3 text encoder: the base with classifier-free guidance, the distilled model without.

    The pipeline ignores a guidance scale where its ``is_distilled`` is set; here a scale other than 1 guides.
    """

    pipeline_class = "Flux2KleinPipeline"

    def chat(self, prompt: str) -> str:
        return self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
