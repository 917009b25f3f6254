"""The operators of a network, each one function over shared tensors."""
