"""Machine code of gptq_backend's CUDA kernels: ``sm_ARCHITECTURE-BITS.xz``, PTX, and contents.json about them."""
