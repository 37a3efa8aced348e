"""What comes from outside is printed without control characters, and cut."""

import io
import sys
import unicodedata

import pytest

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.cli.printing import clipped, escaped, named, quoted, say, sentence
from jaxmorph.cli.progress import make_progress

REVERSED = "‪‫‬‭‮⁦⁧⁨⁩"  # directions of writing
EVERY = "".join(map(chr, range(sys.maxunicode + 1)))


def test_every_control_character_is_escaped_and_nothing_else():
    """The oracle is Unicode's own table of categories."""
    categories = {"Cc", "Cs", "Zl", "Zp"}
    acts = {c for c in EVERY if unicodedata.category(c) in categories} | {*REVERSED}
    changed = {c for c in EVERY if escaped(c) != c}
    assert changed == acts
    assert escaped("a\x1b[31m\x9b\u202e\ud800\r\n\t") == r"a\x1b[31m\x9b\u202e\ud800\r\n\t"
    assert escaped("\r\n\t", kept="\n\t") == "\\r\n\t"
    assert escaped("訓練 👩‍👩‍👧 é\u00a0") == "訓練 👩‍👩‍👧 é\u00a0"


def test_long_text_is_cut_in_its_middle():
    text = "".join(map(str, range(100_000)))
    cut = clipped(text, 300)
    assert len(cut) < 340
    assert text.startswith(cut[:200])
    assert text.endswith(cut[-100:])
    assert f"{len(text):,} characters" in cut
    assert clipped(text, len(text)) == text


def deep(depth):
    """Lists and mappings in one another."""
    found: object = 1
    for _ in range(depth):
        found = [{"a": found}]
    return found


@pytest.mark.parametrize(
    "value",
    [
        *("x" * 10**6, "\x1b" * 10**6, "\ud800" * 1000, b"x" * 10**6, 10**400, -(10**4000)),
        *([1] * 10**6, {n: n for n in range(10**5)}, [["x" * 1000] * 100] * 100, deep(10**5)),
    ],
)
def test_values_of_any_size_are_quoted_in_one_short_line(value):
    text = quoted(value)
    assert len(text) <= 1300
    assert text.isprintable()


@pytest.mark.parametrize("value", ["a 'b'", 5, -0.5, None, True, [1, "x"], {"b": 1, "a": [2]}])
def test_what_is_short_is_quoted_as_python_would(value):
    assert quoted(value) == repr(value)


def test_an_error_is_one_short_line_whatever_it_quotes():
    nasty = "\x1b[2J\r\n\u202e\ud800" * 10_000
    text = str(InputError(nasty, nasty, nasty, nasty))
    assert text.isprintable()
    assert len(text) < 40_000 // 4
    assert str(InputError("f.yaml", "", None, "x")) == "f.yaml: expected x"
    assert named("a\nb") == r"a\nb"
    assert sentence("a\nb") == "a b"


def test_no_suggestion_is_sought_for_what_is_no_word():
    assert nearest("n_layer", ["n_layers"]) == " (did you mean 'n_layers'?)"
    assert nearest("n_layers" * 1000, ["n_layers" * 1000]) == ""


@pytest.mark.parametrize("kind", ["lines", "bar"])
def test_notes_and_facts_of_a_run_are_escaped(kind, capsys):
    with make_progress(kind, 0, 10) as progress:
        progress.note("=== a \x1b]0;title\x07 \x9b31m\r\n\tb ===")
        progress.update(1, "[bold]loss\x1b[31m", None)
    shown = capsys.readouterr().out
    assert r"a \x1b]0;title\x07 \x9b31m\r" in shown
    assert "b ===" in shown
    assert r"[bold]loss\x1b[31m" in shown
    assert {"\x07", "\x9b"}.isdisjoint(shown)
    assert ("\x1b" in shown) == (kind == "bar" and "\x1b[" in shown)  # a terminal's own sequences


def test_say_prints_at_once_to_the_stream_of_the_moment(capsys):
    say("a\x1b")
    say("b", end="", file=sys.stderr)
    assert capsys.readouterr() == ("a\\x1b\n", "b")
    stream = io.StringIO()
    say("c\x00", file=stream)
    assert stream.getvalue() == "c\\x00\n"
