"""The CUDA kernel: its layout of the weight, its launch plans, its operator."""
