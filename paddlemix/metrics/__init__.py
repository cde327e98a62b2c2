"""How good captions are: n-gram scores against references, and attributes read back from them."""
