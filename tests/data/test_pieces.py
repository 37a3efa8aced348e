import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmorph.data import pieces as module
from jaxmorph.data.pieces import byte_of_character, count_characters, decoded, pieces

TEXTS = st.text(alphabet=" \n\r\tab.é—日🙂\u00a0\x1c\x85", max_size=60)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 5)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(0, 60))
def test_pieces_are_the_text(text, number):
    content = text.encode()
    for each in (content, memoryview(content)):
        assert "".join(decoded(each)) == text
        assert count_characters(each) == len(text)
        number = min(number, len(text))
        assert each[: byte_of_character(each, number)] == text[:number].encode()
        assert list(pieces(each, "")) == [text]
        cut = list(pieces(each, " \n"))
        assert "".join(cut) == text
        for before, after in itertools.pairwise(cut):
            assert after[0] in " \n"
            assert not before[-1].isspace()


def test_long_text_is_cut():
    assert len(list(pieces(b"word " * 50, " "))) > 20


@pytest.mark.parametrize("place", range(12))
def test_the_place_of_a_wrong_byte_is_told(place):
    content = bytearray("ab—é🙂c".encode())
    content[place] = 0xFF
    with pytest.raises(UnicodeDecodeError) as expected:
        content.decode()
    with pytest.raises(UnicodeDecodeError) as caught:
        list(decoded(bytes(content)))
    assert caught.value.start == expected.value.start
    with pytest.raises(UnicodeDecodeError):
        count_characters("é".encode()[:1])  # the end of a character is missing
