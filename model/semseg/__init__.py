"""Segmentation heads: DeepLabV3+ and the atrous convolution in it."""
