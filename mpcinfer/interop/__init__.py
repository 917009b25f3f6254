"""Bridges to other systems. Nothing else of the package imports them; what they bridge to is no requirement of it."""
