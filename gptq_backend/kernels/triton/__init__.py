"""The Triton kernel: its layout of the weight, its launch plans, its programs, its operator."""
