"""The process that deals correlated randomness, ahead of time and independent of all data."""
