"""What model owners and data owners use: deploy, infer."""
