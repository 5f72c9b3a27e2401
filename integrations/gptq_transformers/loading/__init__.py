"""What happens when a quantized checkpoint is loaded, in order; ``hf_quantizer`` takes these steps for transformers.

1. ``skeleton``: refuse a config.json that claims more than the files hold. ``newer_config``: read one of version 5 in
   version 4.
2. ``checkpoint_names``: what the model calls the tensors of the files.
3. ``prepare``: put QuantLinears where the weights will go; ``split_layers`` and ``experts.unfuse`` first make a module
   of every layer that the checkpoint has.
4. transformers reads the weights.
5. ``finish``: restore what that cast, check with ``checks`` that all is there and finite, and prepare the kernels.
"""
