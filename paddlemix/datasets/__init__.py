"""From files to batches: a row is a line of a table, a record an object of a train.json, a sample what training takes.

    archives, blocks             bytes of tables, also inside archives, read ahead in blocks and lines
    tsv, rows                    rows of a TSV, CSV or train.json, and the bytes of their images
    records                      one record of a train.json, checked
    labels, cleaning, doubts     rows to records: tools/convert_labels.py
    writing                      rows and records to files
    json_index, open_files       where the records of a file are, and reading them there
    entries                      the key `dataset` of a training config
    chatml                       records to samples
    lengths, packing, collator   lengths of samples in tokens, several samples in a sequence, samples to a batch
    caption_files, score_files   results, references and scores by id
    thumbnails                   small pictures for pages

Training: train.json → json_index → chatml → (packing) → collator. Prediction: rows → inference.captioner.
"""
