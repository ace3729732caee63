"""Batches: files of chat requests, worked off in the background, their answers in files."""
