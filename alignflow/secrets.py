"""Redaction of secrets (passwords, keys, tokens) from everything that people share.

A config must not hold one: run folders, reports and model cards copy it. It holds ``${NAME}`` instead, and
:func:`resolve` reads the environment variable where the value is used. :func:`redact` removes what may still turn up
in errors, replies of servers and command lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from alignflow.text import printable

HIDDEN = "***"
LONGEST = 10_000_000  # characters that are shown of anything
SHORTEST = 6  # characters; a shorter value would be found by chance in ordinary text

_ALWAYS = {
    "apikey", "authorization", "bearer", "cookie", "credential", "credentials", "passphrase", "passwd", "password",
    "pwd", "secret", "secrets",
}  # fmt: skip
_BEFORE_KEY = {"access", "account", "api", "auth", "encryption", "master", "private", "secret", "signing", "ssh"}
_ORDINARY_TOKENS = {
    "bos", "cls", "end", "eos", "first", "image", "last", "mask", "next", "no", "pad", "per", "sep", "special", "start",
    "stop", "think", "unk", "video", "yes",
}  # fmt: skip
_IN_ADDRESSES = {"sig", "signature"}
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
_USER = re.compile(r"(?<=://)[^\s/?#'\"]+(?=@)")
_QUERY = re.compile(r"([?&;])([\w.~-]+)=([^&;#\s'\"]+)")
_SHAPES = re.compile(
    r"(?<=\bBearer )[\w.~+/=-]+|(?<=\bBasic )[A-Za-z0-9+/=]{8,}|\bsk-[\w-]{16,}|\bhf_[A-Za-z0-9]{16,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}"
    r"|\bAKIA[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"
)
_NAMED = re.compile(r"([A-Za-z][\w.-]*)[\"']?\s*[:=]\s*")
_VALUE = re.compile(r"\"[^\"]*\"?|'[^']*'?|[\[{][^\]}]*[\]}]?|[^\s,;&}\])\"']+")
_remembered: set[str] = set()

T = TypeVar("T")


def names_secret(key: str) -> bool:
    """Whether a setting, header or parameter of this name holds a secret: ``api_key``, ``X-Auth-Token``, ``password``.

    ``token_env`` names a variable and ``max_tokens`` counts: neither does.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key)
    words = [word.lower() for word in words]
    if not words or words[-1] in ("env", "file", "path"):
        return False
    if _ALWAYS & set(words):
        return True
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last == "token":
        return before not in _ORDINARY_TOKENS
    return last == "key" and (before in _BEFORE_KEY or before == "")


def remember(value: str | None) -> None:
    """Hide this value in everything that :func:`redact` is given from now on."""
    if value and len(value) >= SHORTEST:
        _remembered.add(value)


def redact(text: object) -> str:
    """``text`` with ``***`` for credentials in addresses, values of secret names, known tokens and those remembered."""
    shown = str(text)
    known = {value for name, value in os.environ.items() if _is_secret(name, value)}
    for value in sorted(_remembered | known, key=len, reverse=True):
        shown = shown.replace(value, HIDDEN)
    shown = _USER.sub(_keeping_references, shown)
    shown = _QUERY.sub(_parameter, shown)
    shown = _SHAPES.sub(HIDDEN, shown)
    return _without_named(shown)


def shown(text: object) -> str:
    """``text`` as it may be printed or logged: without secrets, terminal escapes and control characters."""
    return printable(redact(text), LONGEST)


def find(tree: Any, path: tuple[str, ...] = (), named: bool = False) -> Iterator[tuple[str, ...]]:
    """Paths of values in nested mappings and lists that hold a secret; ``${NAME}`` is not one.

    Args:
        path: where ``tree`` stands.
        named: whether something around it has the name of a secret.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from find(value, (*path, str(key)), named or names_secret(str(key)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from find(value, (*path, str(index)), named)
    elif isinstance(tree, str):
        if _in_text(tree) or (named and tree != "" and not _REFERENCE.search(tree)):
            yield path
    elif named and isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path


def resolve(value: T) -> T:
    """``value`` with every ``${NAME}`` in its texts replaced by the environment variable, whose value is remembered.

    Raises:
        KeyError: naming a variable that is not set.
    """
    if isinstance(value, str):
        return _REFERENCE.sub(_variable, value)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {key: resolve(inside) for key, inside in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(map(resolve, value))  # type: ignore[call-arg, return-value]
    return value


def _is_secret(variable: str, value: str) -> bool:
    """Whether an environment variable holds a secret; paths such as PWD are not."""
    return len(value) >= SHORTEST and not value.startswith("/") and names_secret(variable)


def _in_text(text: str) -> bool:
    """Whether a text holds credentials by its form alone: in an address, or as a known token."""
    users = any(not _REFERENCE.search(found) for found in _USER.findall(text))
    return users or bool(_SHAPES.search(text)) or _QUERY.sub(_parameter, text) != text


def _variable(match: re.Match[str]) -> str:
    value = os.environ.get(match[1])
    if not value:
        raise KeyError(match[1])
    remember(value)
    return value


def _keeping_references(match: re.Match[str]) -> str:
    return match[0] if _REFERENCE.search(match[0]) else HIDDEN


def _parameter(match: re.Match[str]) -> str:
    words = re.findall(r"[a-z]+", match[2].lower())
    secret = names_secret(match[2]) or bool(words and words[-1] in _IN_ADDRESSES)
    return f"{match[1]}{match[2]}={HIDDEN}" if secret and not _REFERENCE.search(match[3]) else match[0]


def _without_named(text: str) -> str:
    """``text`` with the values hidden that are behind the name of a secret, as in YAML, JSON or an override."""
    parts, start = [], 0
    for match in _NAMED.finditer(text):
        name, end = match[1].rpartition(".")[2], match.end()
        if end < start or not names_secret(name):
            continue
        before = text[: match.start()].rstrip()[-1:]
        if match[1].lower() == "key" and before not in ("{", ",", "'", '"'):  # a word of ordinary sentences
            continue
        value = _VALUE.match(text, end)
        if value is None or "${" in value[0] or value[0] in ("null", "None", HIDDEN):
            continue
        quote = value[0][0] if value[0][0] in "\"'" else ""
        parts += [text[start:end], quote, HIDDEN, quote]
        start = value.end()
    return "".join([*parts, text[start:]])
