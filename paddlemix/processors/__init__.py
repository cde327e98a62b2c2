"""Images to pixel values (images), texts with images (content), conversations to ids and labels (mgen_vl_processing),
captions as text (postprocess)."""
