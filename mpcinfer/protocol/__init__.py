"""The protocols, each written once against a context: nothing here knows of networks or of torch modules."""
