"""Text into batches: corpora, tokenizers, the stream of examples."""
