"""The wire: identities, channels, the mesh between parties, and the generated code of the contract."""
