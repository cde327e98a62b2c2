"""Evaluation of captions: n-gram scores against references, and attributes extracted from them."""
