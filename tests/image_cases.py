"""Parity cases of FLUX.2, the Qwen-Image editors and Sana, as in :mod:`adapter_cases`."""

from __future__ import annotations

import tiny_flux2
from adapter_cases import Case

from generators.base import Options

CASES = [
    Case(
        "flux2", "flux2", tiny_flux2.dev, call={"guidance_scale": 4.0, "max_sequence_length": 384},
        options=Options(size=(64, 64), text_length=384),
    ),
    Case(
        "flux2-wide", "flux2", tiny_flux2.dev, call={"guidance_scale": 2.5},
        options=Options(size=(32, 96), embedded_guidance=2.5),
    ),
    Case(
        "flux2-klein", "flux2_klein", tiny_flux2.klein, call={"guidance_scale": 1.0, "max_sequence_length": 96},
        options=Options(size=(96, 64), text_length=96),
    ),
    Case("flux2-klein-cfg", "flux2_klein", tiny_flux2.klein, guidance=4.0, call={"guidance_scale": 4.0}),
    Case(
        "flux2-klein-distilled", "flux2_klein", lambda: tiny_flux2.klein(distilled=True),
        call={"guidance_scale": 4.0, "max_sequence_length": 96}, options=Options(size=(64, 64), text_length=96),
    ),
]  # fmt: skip
