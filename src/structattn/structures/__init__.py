"""Structured matrices with one face: dense, product, bilinear form, feature maps, costs, projection."""
