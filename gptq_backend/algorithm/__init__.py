"""GPTQ of one weight: tensors in, tensors out."""
