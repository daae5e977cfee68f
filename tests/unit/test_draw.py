"""The drawings of the pages are the ones that dev/draw.py makes."""

from xml.etree import ElementTree

import pytest

from dev.draw import DOCS, DRAWINGS, LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", DRAWINGS)
def test_the_files_are_what_the_script_draws(name: str, language: str) -> None:
    path = DOCS / language / f"{name}.svg"
    advice = "draw them again: python -m dev.draw"
    assert path.read_text(encoding="utf-8") == DRAWINGS[name](language), advice
    assert path.stat().st_size < 40_000


@pytest.mark.parametrize("name", DRAWINGS)
def test_both_languages_have_the_same_shapes(name: str) -> None:
    english, chinese = (ElementTree.fromstring(DRAWINGS[name](language)) for language in LANGUAGES)
    shapes = [[(part.tag, part.attrib) for part in root.iter()] for root in (english, chinese)]
    assert shapes[0] == shapes[1]
    labels = ["".join(root.itertext()) for root in (english, chinese)]
    assert labels[0].isascii() is False and labels[0] != labels[1]


@pytest.mark.parametrize("name", DRAWINGS)
def test_nothing_lies_outside(name: str) -> None:
    root = ElementTree.fromstring(DRAWINGS[name]("en"))
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    for part in root.iter():
        x, y = (float(part.get(at, 0)) for at in ("x", "y"))
        assert 0 <= x <= x + float(part.get("width", 0)) <= width
        assert 0 <= y <= y + float(part.get("height", 0)) <= height
