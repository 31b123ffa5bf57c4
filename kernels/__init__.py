"""Place of the Triton back end of the directional contrastive loss operator."""
