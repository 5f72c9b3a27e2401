"""What training on calibration data adds to GPTQ: scales, blocks, and the whole model."""
