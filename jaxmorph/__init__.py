"""Train transformers that change shape while they train."""

__version__ = "0.1.0"
