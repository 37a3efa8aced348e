"""From text to batches: corpora, tokenizers, the stream of examples."""
