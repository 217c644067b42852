"""Invertible Neural Skinning in torch: tensors in, tensors out.  No files, no network, no clock."""
