"""Calibration: quantize a model, find what that damaged, and train compensators for it."""
