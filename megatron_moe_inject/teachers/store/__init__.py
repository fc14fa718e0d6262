"""Stores: what a teacher said about a text, kept on disk and read in its place."""
