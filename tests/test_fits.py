"""The tables of docs/scale.md and docs/memory.md, and with them every claim that a shipped config fits on a card."""

from __future__ import annotations

import re

import pytest

from align.checking.estimate import GB
from benchmarks import fits

SCALE, MEMORY = ((fits.ROOT / "docs" / name).read_text().splitlines() for name in ("scale.md", "memory.md"))


def claimed() -> list[tuple[str, str, int, str]]:
    """(model, config, GB of the card, preset) of each config that the page names."""
    found = []
    for line in SCALE:
        if row := re.fullmatch(r"\| (\d+) GB \| `(\w+)` \| (.*) \|", line):
            for part in row[3].split("; "):
                model, names = part.split(": ")
                found += [(model.strip("`"), name, int(row[1]), row[2]) for name in names.split(", ")]
    return found


def test_every_shipped_config_is_in_the_table() -> None:
    assert sorted((model, name) for model, name, *_ in claimed()) == sorted(fits.shipped())
    assert len(claimed()) > 40


@pytest.mark.parametrize("model", sorted({model for model, *_ in claimed()}))
def test_configs_fit_where_the_page_says_so(model: str) -> None:
    for name, card, preset in [row[1:] for row in claimed() if row[0] == model]:
        assert fits.needed(model, name, preset) <= card * GB, name
        assert fits.fitting(model, name, card) == (preset, fits.needed(model, name, preset)), name
        smaller = [size for size in fits.CARDS if size < card]
        assert not smaller or fits.fitting(model, name, smaller[-1]) is None, name


@pytest.mark.few(2)
@pytest.mark.parametrize("model", fits.MODELS)
def test_rows_of_machines(model: str) -> None:
    assert fits.machines(model) in SCALE


@pytest.mark.slow
@pytest.mark.parametrize("model", fits.SWAPPED)
def test_rows_of_swapped_blocks(model: str) -> None:
    assert fits.swapping(model) in MEMORY


def test_the_command_prints_the_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "MODELS", {"sd35-medium": fits.MODELS["sd35-medium"]})
    monkeypatch.setattr(fits, "SWAPPED", {})
    monkeypatch.setattr(fits, "shipped", lambda: iter([("sd35-medium", "srpo"), ("sd35-medium", "nft")]))
    fits.main()
    assert capsys.readouterr().out.split("\n\n")[1].splitlines() == [
        "| 12 GB | `12gb` | `sd35-medium`: nft |", "| 16 GB | `12gb` | `sd35-medium`: srpo |"
    ]  # fmt: skip
