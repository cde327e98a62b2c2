"""Asking a model: `loading` (a model folder), `captioner` (rows to captions, in batches), `results` (the
output file and its journal), `prediction` (the whole job of predict.py)."""
