"""From files to batches: `tsv` (rows), `labels` (TSV to train.json), `json_index` and `chatml` (records by index),
`collator` (samples to a batch)."""
