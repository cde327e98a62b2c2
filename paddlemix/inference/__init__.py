"""Inference: `options` (of the scripts), `loading` (a model folder), `captioner` (images to captions, in batches),
`results` (the output file and its journal), `prediction` (the job of predict.py)."""
