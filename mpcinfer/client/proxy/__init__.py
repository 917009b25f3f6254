"""OpenAI's API on the data owner's machine: applications talk to it as they are, and no text of theirs goes further."""
