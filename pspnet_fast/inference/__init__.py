"""Prediction of whole images, and pictures of label maps."""
