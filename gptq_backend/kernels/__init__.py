"""Multiplying by a packed weight: one table of kernels, one folder or file per kind of device."""
