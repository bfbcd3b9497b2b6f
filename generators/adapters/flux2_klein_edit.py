"""FLUX.2 klein as an editor: ``Flux2KleinPipeline`` with one source image per prompt."""

from __future__ import annotations

from generators.adapters.flux2_edit import Flux2Edit
from generators.adapters.flux2_klein import Flux2Klein


class Flux2KleinEdit(Flux2Edit, Flux2Klein):
    """Source image tokens as in :class:`Flux2Edit`, text encoding as in :class:`Flux2Klein`."""

    pipeline_class = "Flux2KleinPipeline"
