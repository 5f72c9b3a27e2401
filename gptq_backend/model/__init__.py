"""Walking through a model: its structure, what its layers see, and where its tensors lie."""
