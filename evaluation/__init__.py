"""Evaluation: features of images, metrics on them, and the protocol that makes each number reproducible."""
