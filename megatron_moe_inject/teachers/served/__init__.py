"""Servers: what a teacher says about a text, asked over HTTP while the student trains."""
