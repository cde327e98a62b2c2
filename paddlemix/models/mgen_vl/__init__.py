"""MGen-VL: ViT encoder (vision), attn_pool (connector), decoder (language), joined in modeling."""
