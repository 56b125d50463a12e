"""Guides q(z | x): importable into any Pyro program."""
