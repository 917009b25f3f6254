"""Signed statements: who runs what, who may use it, what was done."""
