"""Whole calls of `generate`, text in to text out, beside other libraries and other models."""
