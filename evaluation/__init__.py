"""Measuring pictures: features, distances between distributions, coverage, and the protocol beside each number."""
