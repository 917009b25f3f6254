"""The process that computes on one share of everything."""
