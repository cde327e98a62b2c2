"""What is in a set of images and captions, and which of its rows to keep.

    caption_facts, image_facts   what is counted of a caption and of an image
    near_duplicates              groups of images with nearly the same hash
    inspection, advice           statistics of a set, and what they suggest: tools/inspect_data.py
    report_page                  its report
    selection                    rows that rules keep: tools/curate_data.py
"""
