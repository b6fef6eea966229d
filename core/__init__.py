"""Code shared by all commands: argument parsing, user-facing errors and files."""
