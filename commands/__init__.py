"""The commands as functions, and their arguments as dataclasses; the scripts parse the arguments and call these."""
