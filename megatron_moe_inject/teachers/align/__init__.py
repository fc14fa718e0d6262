"""Teachers with a tokenizer of their own: the same text read by both, compared chunk by chunk."""
