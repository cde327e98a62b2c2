"""Images to pixel values (images), conversations to ids and labels (mgen_vl_processing), repairs of captions
(postprocess)."""
