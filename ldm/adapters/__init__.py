"""What is attached to a network for one run of a sampler and changes its numbers: DeepCache, token merging (ToMe)."""
