"""Cache of text conditioning on the CPU or in safetensors files, so that the encoders can be unloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from alignflow.files import tensor_files
from generators.errors import GeneratorError

Rows = dict[str, Tensor]


class TextCache:
    """Results of ``encode_text`` for every known prompt.

    Args:
        folder: keep the rows in files there, read one by one when asked for; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[str, Rows] = {}
        self._files: dict[str, tuple[Path, int]] = {}
        for file in sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else ():
            try:
                with safe_open(file, "pt") as opened:
                    self._index(file, opened.metadata()["keys"].split())
            except SafetensorError:
                continue  # cut short: its prompts are encoded again and it is replaced

    def __len__(self) -> int:
        return len(self._memory) + len(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._files

    def add(self, keys: Sequence[str], encoded: Mapping[str, Tensor]) -> None:
        """Keep the rows ``[B, ...]`` of ``B = len(keys)`` prompts; raises OSError if a file cannot be written."""
        rows = {name: value.detach().cpu() for name, value in encoded.items()}
        if self.folder is None:
            for index, key in enumerate(keys):
                self._memory[key] = {name: value[index : index + 1].clone() for name, value in rows.items()}
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{keys[0][:16]}.safetensors"
        tensor_files.save(file, {name: value.contiguous() for name, value in rows.items()}, {"keys": " ".join(keys)})
        self._index(file, keys)

    def rows(self, key: str) -> Rows:
        """Name -> ``[1, ...]`` of one prompt, on the CPU.

        Raises:
            GeneratorError: it was never added, and there is no encoder to ask.
        """
        if key in self._memory:
            return self._memory[key]
        if key not in self._files:
            raise GeneratorError(
                "a prompt is not in the cache, and the text encoders were dropped (memory.cache_prompts)"
            )
        file, index = self._files[key]
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name)[index : index + 1] for name in opened.keys()}  # noqa: SIM118

    def _index(self, file: Path, keys: Sequence[str]) -> None:
        self._files |= {key: (file, index) for index, key in enumerate(keys)}


def key_of(prompt: str, inputs: Mapping[str, Tensor], index: int) -> str:
    """Key of a prompt and the media it came with (row ``index`` of ``inputs``)."""
    digest = hashlib.sha256(prompt.encode("utf-8"))
    for name in sorted(inputs):
        digest.update(name.encode())
        digest.update(inputs[name][index].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that read prompts, by component name."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)}
