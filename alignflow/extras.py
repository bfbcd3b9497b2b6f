"""Optional packages: which extra installs each, and the version that was tested."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRAS = {
    "datasets": ("data", "datasets==5.2.0"),
    "ray": ("ray", "ray==2.60.0"),
    "msgpack": ("sglang", "msgpack==1.2.4"),
    "fastapi": ("serve", "fastapi==0.165.0"),
    "uvicorn": ("serve", "uvicorn==0.54.0"),
    "tensorboard": ("tensorboard", "tensorboard==2.21.0"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
    "rapidocr": ("ocr", "rapidocr>=3"),
    "onnxruntime": ("ocr", "onnxruntime"),
    "bitsandbytes": ("quant", "bitsandbytes"),
    "torchao": ("quant", "torchao"),
    "xformers": ("xformers", "xformers>=0.0.29"),
    "kernels": ("kernels", "kernels>=0.12.3"),
}
"""Module -> (extra of this package, requirement). An exact version is the one in constraints.txt."""


def remedy(module: str) -> str:
    """The command that installs an optional module: ``pip install 'ray==2.60.0'``."""
    return f"pip install '{EXTRAS[module][1] if module in EXTRAS else module}'"


def optional(module: str, user: str, error: type[Exception]) -> ModuleType:
    """Import an optional module where it is used.

    Args:
        user: the setting or feature that needs it, for the message.
        error: raised where the module is missing or fails to import; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as reason:
        missing = isinstance(reason, ModuleNotFoundError) and reason.name == module
        said = "which is not installed" if missing else f"which does not import ({reason})"
        raise error(f"{user} needs the package {module}, {said}: {remedy(module)}") from reason
