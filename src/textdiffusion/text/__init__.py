"""Text as tokens: tokenizers, corpora and how they are split, windows, shards, and patterns of text."""
