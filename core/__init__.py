"""Shared by every command: user errors, argument parsing, files."""
