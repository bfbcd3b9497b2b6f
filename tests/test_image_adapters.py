"""What single image adapters do beyond the parity that all share."""

from __future__ import annotations

import pytest
import tiny_flux2

from generators.base import GeneratorError, Options
from generators.load import adapter


@pytest.mark.parametrize(("kind", "build"), [("flux2", tiny_flux2.dev), ("flux2_klein", tiny_flux2.klein)])
def test_flux2_counts_its_chat_template_among_the_tokens(kind, build):
    pipeline = build()
    frame = len(pipeline.tokenizer(adapter(kind)(pipeline).chat("")).input_ids)
    generator = adapter(kind)(pipeline, Options(size=(32, 32), text_length=frame + 5))
    assert generator.encode(["abcde"]).tensors["embeds"].shape[:2] == (1, frame + 5)
    with pytest.raises(GeneratorError, match=rf"prompt 1 \('abcdef' ...\) has {frame + 6} tokens, the model reads"):
        generator.encode(["abcde", "abcdef"])
