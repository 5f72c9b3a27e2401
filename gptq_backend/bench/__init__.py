"""How fast is a quantized product, measured so that the figure means something. Commands: ``gptq-backend bench``.

``timing`` interleaves what is compared, ``machine`` says what the hardware allows, ``gemm`` does one layer's product.
"""
