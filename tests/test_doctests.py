"""The examples in the package's docstrings run, and say what they show."""

import doctest
import importlib

import pytest
from test_layers import MODULES

from jaxmorph import morphs

WITH_EXAMPLES = [name for name, path in MODULES.items() if ">>>" in path.read_text()]
# These are what a stranger meets first.
SHOWN = ("apply", "deepen", "keep", "moved", "trained", "widen")


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


def test_what_changes_a_model_shows_an_example():
    assert "jaxmorph.morphs" in WITH_EXAMPLES
    for name in SHOWN:
        assert ">>>" in (getattr(morphs, name).__doc__ or ""), name
