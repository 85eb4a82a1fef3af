"""Prediction of images, whole or in windows, and pictures of label maps."""
