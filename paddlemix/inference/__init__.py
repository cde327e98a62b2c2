"""From a model and rows, or questions, to answers.

    options, source, loading     command-line options, the folders of a model, the loaded model
    captioner, choosing          images to captions in batches, the best of several answers
    prediction                   rows of a file to lines of results: predict.py, and the part that score_rows.py shares
    results, n_best              the files of results and of candidates, written atomically and resumable
    row_shards                   joining the results of several processes: merge_results.py
    combining                    the consensus of several models' results: combine_results.py
    scoring                      the loss of captions with and without their image: score_rows.py
    conversation, boxes          chat.py, and the boxes in its answers
    facts                        what identifies a file and a model
"""
